// A canvas as it stands after the step that is shown.
import { signal } from "@preact/signals";
import { useRef } from "preact/hooks";
import type { Canvas, State } from "./canvas";
import { stateAt } from "./canvas";
import { copy } from "./copy";
import type { Selection } from "./parts";
import { templateOf, textOf } from "./parts";
import { shown } from "./player";
import type { Run } from "./run";
import { written } from "./template";

/** What colours tell. */
export const COLOURS = { certainty: "how sure it was", time: "when it came", none: "nothing" } as const;
export const colours = signal<keyof typeof COLOURS>("certainty");

/** Shades of a colour. */
const SHADES = 5;
/** Log-probabilities between shades, surest first: nine in ten, one in two, one in eight, one in fifty. */
const SURE = [Math.log(0.9), Math.log(0.5), Math.log(1 / 8), Math.log(1 / 50)];

const selection = signal<Selection | undefined>(undefined);

interface Props {
  run: Run;
  canvas: Canvas;
  at: number;
  /** What the text is worth, once canvases were ranked. */
  worth?: string;
  onEdit: (template: string, start: boolean) => void;
}

/** A canvas with what can be done with it. */
export function CanvasView({ run, canvas, at, worth, onEdit }: Props) {
  const cells = useRef<HTMLParagraphElement>(null);
  const state = stateAt(canvas, shown.value);
  const pieces = run.pieces.value.known.value;
  if (!state) return <section class="canvas" aria-label={`Sample ${at + 1}`}>waiting …</section>;
  const isLast = state === canvas.states.at(-1);
  const text = isLast && canvas.result ? canvas.result.text : textOf(state, pieces);
  const selected = selection.value?.canvas === at ? selection.value : undefined;
  const edit = (kind: "gap" | "draft") => onEdit(written(templateOf(state, pieces, selected, kind)), true);
  return (
    <section class="canvas" aria-label={`Sample ${at + 1}`}>
      <p ref={cells} class="cells" aria-hidden="true" onPointerUp={() => select(cells.current, at)}>
        {state.tokens.map((token, position) => (
          <span class={looks(state, position)} data-at={position} title={tells(state, position)}>
            {state.masked[position] ? "░░" : word(pieces.get(token) ?? "·")}
          </span>
        ))}
      </p>
      <p class="heard">{text}</p>
      <p class="facts">
        {state.masked.filter(Boolean).length} of {state.tokens.length} masked · {state.nfe} evaluations
        {isLast && canvas.result?.early ? " · ended early, for the deadline" : ""}
        {worth === undefined ? "" : ` · ${worth}`}
      </p>
      <div class="row">
        <button type="button" onClick={() => void copy(text)}>
          Copy
        </button>
        <button type="button" onClick={() => onEdit(written(templateOf(state, pieces)), false)}>
          Edit
        </button>
        {state.masked.some(Boolean) && !run.isRunning.value && (
          <button type="button" onClick={() => edit("gap")}>
            Fill the rest anew
          </button>
        )}
        {selected && (
          <>
            <button type="button" onClick={() => edit("gap")}>
              Make selection a gap
            </button>
            <button type="button" onClick={() => edit("draft")}>
              Noise selection again
            </button>
          </>
        )}
      </div>
    </section>
  );
}

/** A token's text, of which the space before it has no colour. */
function word(piece: string) {
  const bare = piece.trimStart();
  return [piece.slice(0, piece.length - bare.length), <span>{bare}</span>];
}

/** Takes the positions that the browser's selection covers. */
function select(cells: HTMLElement | null, canvas: number) {
  const chosen = document.getSelection();
  selection.value = undefined;
  if (!cells || !chosen || chosen.isCollapsed) return;
  const positions = [...cells.children].flatMap((cell, at) => (chosen.containsNode(cell, true) ? [at] : []));
  const [first, last] = [positions.at(0), positions.at(-1)];
  if (first !== undefined && last !== undefined) selection.value = { canvas, from: first, to: last + 1 };
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

/** What the shades mean. */
export function Legend() {
  const words = {
    certainty: ["above 90 %", "above 50 %", "above 12 %", "above 2 %", "less likely"],
    time: ["first fifth of the steps", "second", "third", "fourth", "last"],
    none: [],
  }[colours.value];
  return (
    <ul class="legend" aria-label="Colours">
      {words.map((word, shade) => (
        <li class={`${colours.value}-${shade}`}>{word}</li>
      ))}
    </ul>
  );
}
