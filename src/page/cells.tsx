// The positions of a canvas, of which some can be selected, by mouse or by keyboard.
import { signal, useSignal } from "@preact/signals";
import { useRef } from "preact/hooks";
import type { State } from "./canvas";
import type { Selection } from "./parts";

/** What colours tell. */
export const COLOURS = { certainty: "how sure it was", time: "when it came", none: "nothing" } as const;
export const colours = signal<keyof typeof COLOURS>("certainty");

/** Shades of a colour. */
const SHADES = 5;
/** Log-probabilities between shades, surest first: nine in ten, one in two, one in eight, one in fifty. */
const SURE = [Math.log(0.9), Math.log(0.5), Math.log(1 / 8), Math.log(1 / 50)];

export const selection = signal<Selection | undefined>(undefined);

interface Props {
  state: State;
  pieces: Map<number, string>;
  /** Which canvas this is. */
  at: number;
}

/** A canvas as one line of text, and as a list whose options the keyboard moves over. */
export function Cells({ state, pieces, at }: Props) {
  const cells = useRef<HTMLParagraphElement>(null);
  const isFocused = useSignal(false);
  /** Where the keyboard is, and where its selection began. */
  const cursor = useSignal(0);
  const anchor = useSignal(0);
  const last = state.tokens.length - 1;
  const selected = selection.value?.canvas === at ? selection.value : undefined;
  const isSelected = (position: number) => selected !== undefined && position >= selected.from && position < selected.to;

  function onKeyDown(event: KeyboardEvent) {
    if (event.altKey) return;
    const isWithCommand = event.ctrlKey || event.metaKey;
    if (event.key === "Escape" && selected) {
      // Which would stop the run as well.
      event.stopPropagation();
      selection.value = undefined;
    } else if (event.key === " " || (event.key === "a" && isWithCommand)) {
      [anchor.value, cursor.value] = event.key === " " ? [cursor.value, cursor.value] : [0, last];
      take(at, anchor.value, cursor.value);
    } else {
      const to = isWithCommand ? undefined : moved(cells.current, event.key, cursor.value, last);
      if (to === undefined) return;
      cursor.value = to;
      if (event.shiftKey) {
        take(at, anchor.value, to);
      } else {
        anchor.value = to;
        selection.value = undefined;
      }
      cells.current?.children[to]?.scrollIntoView({ block: "nearest" });
    }
    event.preventDefault();
  }

  return (
    <p
      ref={cells}
      class="cells"
      role="listbox"
      tabIndex={0}
      aria-label={`Tokens of sample ${at + 1}`}
      aria-description="Arrow keys move, with Shift they select."
      aria-multiselectable="true"
      aria-activedescendant={`cell-${at}-${cursor.value}`}
      onFocus={() => (isFocused.value = true)}
      onBlur={() => (isFocused.value = false)}
      onKeyDown={onKeyDown}
      onPointerUp={() => select(cells.current, at)}
    >
      {state.tokens.map((token, position) => (
        <span
          id={`cell-${at}-${position}`}
          role="option"
          class={looks(state, position) + (isFocused.value && position === cursor.value ? " active" : "")}
          title={tells(state, position)}
          aria-selected={isSelected(position)}
        >
          {state.masked[position] ? "░░" : word(pieces.get(token) ?? "·")}
        </span>
      ))}
    </p>
  );
}

/** Selects the positions from one up to another, in either order, both included. */
function take(canvas: number, one: number, other: number) {
  selection.value = { canvas, from: Math.min(one, other), to: Math.max(one, other) + 1 };
}

/** Where `key` moves to from a position; nowhere if it is not a key that moves. */
function moved(cells: HTMLElement | null, key: string, from: number, last: number): number | undefined {
  switch (key) {
    case "ArrowLeft":
      return Math.max(0, from - 1);
    case "ArrowRight":
      return Math.min(last, from + 1);
    case "ArrowUp":
      return onNextLine(cells, from, -1);
    case "ArrowDown":
      return onNextLine(cells, from, 1);
    case "Home":
      return 0;
    case "End":
      return last;
    default:
      return undefined;
  }
}

/** The position that stands above (-1) or below (1) another; the same where there is no such line. */
function onNextLine(cells: HTMLElement | null, from: number, way: -1 | 1): number {
  const boxes = [...(cells?.children ?? [])].map((cell) => cell.getClientRects()[0]);
  const here = boxes[from];
  if (!here) return from;
  let best = { at: from, line: Infinity, aside: Infinity };
  boxes.forEach((box, at) => {
    const line = way * ((box?.top ?? here.top) - here.top);
    if (!box || line < here.height / 2 || line > best.line + here.height / 2) return;
    const aside = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
    if (line < best.line - here.height / 2 || aside < best.aside) best = { at, line, aside };
  });
  return best.at;
}

/** Takes the positions that the browser's selection covers. */
function select(cells: HTMLElement | null, canvas: number) {
  const chosen = document.getSelection();
  selection.value = undefined;
  if (!cells || !chosen || chosen.isCollapsed) return;
  const positions = [...cells.children].flatMap((cell, at) => (chosen.containsNode(cell, true) ? [at] : []));
  const [first, last] = [positions.at(0), positions.at(-1)];
  if (first !== undefined && last !== undefined) take(canvas, first, last);
}

/** A token's text, of which the space before it has no colour. */
function word(piece: string) {
  const bare = piece.trimStart();
  return [piece.slice(0, piece.length - bare.length), <span>{bare}</span>];
}

/** The classes of a position. */
function looks(state: State, at: number): string {
  if (state.masked[at]) return "cell masked";
  if (state.clamped[at]) return "cell clamped";
  const committed = state.committedAt[at] ?? 0;
  const fresh = committed === state.step && committed > 0 ? " fresh" : "";
  if (committed === 0 || colours.value === "none") return `cell${fresh}`;
  const logProbability = state.logProbabilities[at] ?? 0;
  const shade =
    colours.value === "certainty"
      ? SURE.filter((limit) => logProbability < limit).length
      : Math.min(SHADES - 1, Math.floor((SHADES * committed) / (state.total + 1)));
  return `cell ${colours.value}-${shade}${fresh}`;
}

/** What a position tells when it is pointed at. */
function tells(state: State, at: number): string {
  if (state.masked[at]) return "masked";
  if (state.clamped[at]) return "given";
  const committed = state.committedAt[at] ?? 0;
  if (committed === 0) return "as it was";
  const percent = 100 * Math.exp(state.logProbabilities[at] ?? 0);
  return `step ${committed} of ${state.total}, probability ${percent < 1 ? percent.toPrecision(1) : percent.toFixed(0)} %`;
}
