// Templates made of what stands on a canvas.
import type { State } from "./canvas";
import type { Part } from "./template";

/** Positions from `from` up to `to`. */
export interface Selection {
  canvas: number;
  from: number;
  to: number;
}

/** The canvas as a template, its masks as gaps and what is selected as a gap or draft. */
export function templateOf(state: State, pieces: Map<number, string>, selected?: Selection, kind: "gap" | "draft" = "gap"): Part[] {
  const parts: Part[] = [];
  state.tokens.forEach((token, at) => {
    const piece = pieces.get(token) ?? "";
    const isSelected = selected !== undefined && at >= selected.from && at < selected.to;
    const wanted = state.masked[at] ? "gap" : isSelected ? kind : "text";
    const last = parts.at(-1);
    if (wanted === "gap") {
      if (last?.kind === "gap") last.positions += 1;
      else parts.push({ kind: "gap", positions: 1, allowed: [] });
    } else if (last?.kind === wanted) {
      last.text += piece;
    } else {
      parts.push({ kind: wanted, text: piece });
    }
  });
  // Special tokens read as nothing.
  return parts.filter((part) => part.kind === "gap" || part.text !== "");
}

/** The runs of positions that the request left open. */
export function gapsOf(state: State): { from: number; to: number }[] {
  const gaps: { from: number; to: number }[] = [];
  state.clamped.forEach((clamped, at) => {
    if (clamped) return;
    const last = gaps.at(-1);
    if (last?.to === at) last.to = at + 1;
    else gaps.push({ from: at, to: at + 1 });
  });
  return gaps;
}

/** The text of positions from `from` up to `to`. */
export function textOf(state: State, pieces: Map<number, string>, from = 0, to = state.tokens.length): string {
  return state.tokens.slice(from, to).map((token, at) => (state.masked[from + at] ? "░" : (pieces.get(token) ?? ""))).join("");
}
