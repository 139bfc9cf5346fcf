// Asks for a token where the server wants one. It is kept in memory alone.
import { useEffect, useRef } from "preact/hooks";
import { token, tokenAsked } from "./api";

export function TokenDialog({ onToken }: { onToken: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const field = useRef<HTMLInputElement>(null);
  const why = tokenAsked.value;
  useEffect(() => {
    if (why !== "" && !dialog.current?.open) dialog.current?.showModal();
    if (why === "") dialog.current?.close();
  }, [why]);
  return (
    <dialog ref={dialog} aria-labelledby="token-title" onCancel={() => (tokenAsked.value = "")}>
      <form
        method="dialog"
        onSubmit={(event) => {
          event.preventDefault();
          token.value = field.current?.value.trim() ?? "";
          tokenAsked.value = "";
          onToken();
        }}
      >
        <h2 id="token-title">Token</h2>
        <p>{why} It is kept in this page's memory and is gone when you leave.</p>
        <label>
          Token
          <input ref={field} type="password" autocomplete="off" required />
        </label>
        <div class="row">
          <button type="submit" class="main">
            Use it
          </button>
          <button type="button" onClick={() => (tokenAsked.value = "")}>
            Not now
          </button>
        </div>
      </form>
    </dialog>
  );
}
