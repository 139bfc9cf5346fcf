// Where text and gaps are typed, and everything else that a request may say.
import { useComputed, useSignal } from "@preact/signals";
import { useRef } from "preact/hooks";
import { diffusion, told } from "./api";
import type { Model } from "./made/denoised/v1/model_service_pb";
import type { Settings } from "./settings";
import { change, nameOf, reference, settings } from "./settings";

interface Props {
  models: Model[];
  isRunning: boolean;
  onStart: () => void;
  onStop: () => void;
  onError: (message: string) => void;
}

/** The form. */
export function Editor({ models, isRunning, onStart, onStop, onError }: Props) {
  const text = useRef<HTMLTextAreaElement>(null);
  const isMarking = useSignal(false);
  const model = useComputed(() => chosen(models, settings.value.model)).value;

  /** Puts a gap or a draft where the selection is. */
  async function mark(kind: "gap" | "draft") {
    const field = text.current;
    if (!field) return;
    const { selectionStart: from, selectionEnd: to, value } = field;
    const selected = value.slice(from, to);
    let marked = `[[~${selected}]]`;
    if (kind === "gap") {
      let positions = 8;
      if (selected !== "") {
        isMarking.value = true;
        try {
          const asked = { model: reference(settings.value.model), text: selected };
          positions = Math.max(1, (await diffusion.tokenize(asked)).tokens.length);
        } catch (error) {
          onError(told(error));
          return;
        } finally {
          isMarking.value = false;
        }
      }
      marked = `[[${positions}]]`;
    } else if (selected === "") {
      onError("Select the text that is to be noised and denoised again first.");
      return;
    }
    change({ template: value.slice(0, from) + marked + value.slice(to) });
    field.focus();
    requestAnimationFrame(() => field.setSelectionRange(from, from + marked.length));
  }

  function onKeyDown(event: KeyboardEvent) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      onStart();
    } else if (event.key === "Escape" && isRunning) {
      event.preventDefault();
      onStop();
    }
  }

  return (
    <form
      class="editor"
      onSubmit={(event) => {
        event.preventDefault();
        onStart();
      }}
      onKeyDown={onKeyDown}
    >
      <label for="template">Text and gaps</label>
      <textarea
        id="template"
        ref={text}
        rows={3}
        spellcheck={false}
        aria-describedby="template-help"
        value={settings.value.template}
        onInput={(event) => change({ template: event.currentTarget.value })}
      />
      <p id="template-help" class="hint">
        <code>[[8]]</code> is a gap of eight tokens, <code>[[1| yes| no]]</code> one of these, <code>[[~so far]]</code> text
        that is noised and denoised again. Without any, the text is continued.
      </p>
      <div class="row">
        <button type="button" disabled={isMarking.value} onClick={() => void mark("gap")}>
          Make selection a gap
        </button>
        <button type="button" onClick={() => void mark("draft")}>
          Noise selection again
        </button>
        <span class="spring" />
        {/* Keys, or the click that stops would submit the button that takes its place. */}
        {isRunning ? (
          <button key="stop" type="button" class="main" onClick={onStop}>
            Stop
          </button>
        ) : (
          <button key="start" type="submit" class="main" title="Ctrl+Enter">
            Denoise
          </button>
        )}
      </div>
      <details>
        <summary>Model, steps and sampler</summary>
        <div class="fields">
          <label>
            Model
            <select value={settings.value.model} onChange={(event) => change({ model: event.currentTarget.value })}>
              <option value="">the server's default</option>
              {models.map((model) => (
                <option value={nameOf(model)}>{nameOf(model)}</option>
              ))}
            </select>
          </label>
          <label>
            Sampler
            <select value={settings.value.sampler} onChange={(event) => change({ sampler: event.currentTarget.value })}>
              <option value="">the model's</option>
              {(model?.samplers ?? []).map((name) => (
                <option value={name}>{name.replaceAll("_", " ")}</option>
              ))}
            </select>
          </label>
          <Field name="steps" label="Steps" hint={`1 to ${model?.limits?.maxSteps ?? "the server's limit"}`} />
          <Field name="temperature" label="Temperature" hint="0 to 100" />
          <Field name="top_p" label="Top-p" hint="above 0, at most 1" />
          <Field name="length" label="Length" hint={`with the text, at most ${model?.limits?.maxLength ?? "the model's"}`} />
          <Field name="samples" label="Samples" hint={`1 to ${model?.limits?.maxSamples ?? "the server's limit"}`} />
          <Field name="seed" label="Seed" hint="the same gives the same" />
          <Field name="start_time" label="Noise of [[~…]]" hint="above 0, at most 1" />
          <Field name="deadline_ms" label="Deadline, ms" hint="then fewer steps" />
        </div>
      </details>
    </form>
  );
}

/** The model that a request with `name` gets. */
export function chosen(models: Model[], name: string): Model | undefined {
  return models.find((model) => (name === "" ? model.isDefault : nameOf(model) === name));
}

function Field({ name, label, hint }: { name: keyof Settings; label: string; hint: string }) {
  return (
    <label>
      {label}
      <input
        name={name}
        inputMode="decimal"
        autocomplete="off"
        placeholder="default"
        aria-describedby={`${name}-hint`}
        value={settings.value[name]}
        onInput={(event) => change({ [name]: event.currentTarget.value })}
      />
      <small id={`${name}-hint`}>{hint}</small>
    </label>
  );
}
