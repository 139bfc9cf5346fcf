// Templates as people type them, which is how the command line has them too: text with gaps such as `[[20]]` or
// `[[1| yes| no]]` and drafts such as `[[~as it was]]`. `\[` stands for a bracket that opens no gap and `\\` for a
// backslash; inside of `[[` and `]]`, `\]` and `\|` stand for themselves.

/** A piece of a template. */
export type Part =
  | { kind: "text"; text: string }
  | { kind: "gap"; positions: number; allowed: string[] }
  | { kind: "draft"; text: string };

/** A template that cannot be read, and where. */
export class TemplateError extends Error {}

/** The parts of `template` from left to right. */
export function parse(template: string): Part[] {
  const parts: Part[] = [];
  let text = "";
  let at = 0;
  const endText = () => {
    if (text !== "") parts.push({ kind: "text", text });
    text = "";
  };
  while (at < template.length) {
    const two = template.slice(at, at + 2);
    if (two === "\\[" || two === "\\\\") {
      text += two[1];
      at += 2;
    } else if (two === "[[") {
      endText();
      const opened = at;
      at += 2;
      const fields = [""];
      for (;;) {
        const next = template.slice(at, at + 2);
        if (next === "") throw new TemplateError(`the gap at “${template.slice(opened, opened + 20)}” has no “]]”`);
        if (next === "]]") break;
        if (next === "\\]" || next === "\\|" || next === "\\\\") {
          fields.push((fields.pop() ?? "") + next[1]);
          at += 2;
        } else if (next[0] === "|") {
          fields.push("");
          at += 1;
        } else {
          fields.push((fields.pop() ?? "") + next[0]);
          at += 1;
        }
      }
      at += 2;
      parts.push(gap(fields));
    } else {
      text += template[at];
      at += 1;
    }
  }
  endText();
  return parts;
}

function gap([first = "", ...allowed]: string[]): Part {
  if (first.startsWith("~")) {
    const text = [first.slice(1), ...allowed].join("|");
    if (text === "") throw new TemplateError("the draft “[[~]]” is empty");
    return { kind: "draft", text };
  }
  const positions = Number(first.trim());
  if (!Number.isInteger(positions) || positions < 1) {
    throw new TemplateError(`“[[${first}]]” is no gap: write how many tokens it has, such as [[8]], or a draft, such as [[~text]]`);
  }
  return { kind: "gap", positions, allowed };
}

/** `text` as a template has it. */
export function escaped(text: string): string {
  return text.replace(/\\(?=[[\\]|$)|\[(?=\[|$)/g, "\\$&");
}

/** `text` as the inside of a draft has it. */
function escapedInside(text: string): string {
  return text.replace(/\\(?=[\]|\\]|$)|\]|\|/g, "\\$&");
}

/** A template of `parts`. */
export function written(parts: Part[]): string {
  return parts.map(writtenPart).join("");
}

function writtenPart(part: Part): string {
  switch (part.kind) {
    case "text":
      return escaped(part.text);
    case "draft":
      return `[[~${escapedInside(part.text)}]]`;
    case "gap":
      return `[[${[String(part.positions), ...part.allowed.map(escapedInside)].join("|")}]]`;
  }
}
