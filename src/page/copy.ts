// The clipboard, which browsers give to pages of secure origins alone.
import { problem } from "./api";

/** Puts `text` on the clipboard, or says why not. */
export async function copy(text: string) {
  try {
    await navigator.clipboard.writeText(text);
    problem.value = "";
  } catch {
    problem.value = "This browser does not let this page copy (over http only pages of this machine may): select the text instead.";
  }
}
