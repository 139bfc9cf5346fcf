// A canvas as it stands after the step that is shown.
import { Cells, colours, selection } from "./cells";
import type { Canvas } from "./canvas";
import { stateAt } from "./canvas";
import { copy } from "./copy";
import { templateOf, textOf } from "./parts";
import { shown } from "./player";
import type { Run } from "./run";
import { written } from "./template";

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
  const state = stateAt(canvas, shown.value);
  const pieces = run.pieces.value.known.value;
  if (!state) return <section class="canvas" aria-label={`Sample ${at + 1}`}>waiting …</section>;
  const isLast = state === canvas.states.at(-1);
  const text = isLast && canvas.result ? canvas.result.text : textOf(state, pieces);
  const selected = selection.value?.canvas === at ? selection.value : undefined;
  const edit = (kind: "gap" | "draft") => onEdit(written(templateOf(state, pieces, selected, kind)), true);
  return (
    <section class="canvas" aria-label={`Sample ${at + 1}`}>
      <Cells state={state} pieces={pieces} at={at} />
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
