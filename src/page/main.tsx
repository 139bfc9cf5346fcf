// The page: a form, and the canvases of its newest run.
import { signal, useSignal } from "@preact/signals";
import { render } from "preact";
import { useEffect } from "preact/hooks";
import { models, problem, told } from "./api";
import { COLOURS, colours } from "./cells";
import { copy } from "./copy";
import { Editor } from "./editor";
import type { Model } from "./made/denoised/v1/model_service_pb";
import { PACES, follow, isPlaying, pace, play, run, scrub, shown } from "./player";
import { Run } from "./run";
import { change, fromLink, isTyped, request, resolved, settings, toLink } from "./settings";
import { TokenDialog } from "./token";
import { CanvasView, Legend } from "./view";
import { Candidates, rank } from "./weigh";

const served = signal<Model[]>([]);
/** What to do once there is a token. */
let afterToken = () => {};

async function findModels(): Promise<boolean> {
  try {
    served.value = (await models.listModels({})).models;
    problem.value = "";
    return true;
  } catch (error) {
    problem.value = told(error);
    return false;
  }
}

async function start() {
  afterToken = () => void start();
  problem.value = "";
  const asked = { ...settings.value };
  try {
    const wanted = request(asked);
    if (served.value.length === 0 && !(await findModels())) return;
    const next = new Run(wanted, served.value);
    next.accepted.subscribe((accepted) => {
      if (accepted) history.replaceState(null, "", toLink(resolved(asked, accepted)));
    });
    follow(next, 0);
  } catch (error) {
    problem.value = isTyped(error) ? error.message : told(error);
  }
}

function Page() {
  const current = run.value;
  useEffect(() => {
    const { given } = fromLink(location.hash);
    afterToken = () => void (given ? start() : findModels());
    afterToken();
    addEventListener("hashchange", () => {
      settings.value = fromLink(location.hash).settings;
      void start();
    });
  }, []);
  return (
    <>
      <header>
        <h1>denoised</h1>
        <p>text out of noise, step by step</p>
      </header>
      <main>
        <Editor
          models={served.value}
          isRunning={current?.isRunning.value ?? false}
          onStart={() => void start()}
          onStop={() => current?.stop()}
          onError={(message) => (problem.value = message)}
        />
        <p role="alert" class="problem">
          {problem.value}
        </p>
        {current && <RunView run={current} />}
      </main>
      <TokenDialog onToken={() => afterToken()} />
    </>
  );
}

const PHASES = { running: "denoising", waiting: "waiting", stopped: "stopped", done: "done", failed: "failed" };

function RunView({ run }: { run: Run }) {
  const worth = useSignal<{ of: Run; nats: number[] } | undefined>(undefined);
  const canvases = run.canvases.value;
  const accepted = run.accepted.value;
  const total = run.total.value;
  const newest = run.newest.value;
  const step = Math.min(shown.value, newest);
  const isWhole = run.phase.value === "done" && step === newest;
  const nats = worth.value?.of === run ? worth.value.nats : undefined;
  const order = canvases.map((_, at) => at);
  if (nats) order.sort((a, b) => (nats[a] ?? 0) - (nats[b] ?? 0));

  const goOn = () => {
    const next = run.goOn(step);
    if (next) follow(next, step);
  };
  const edit = (template: string, begin: boolean) => {
    change({ template });
    if (begin) void start();
    else document.querySelector<HTMLTextAreaElement>("#template")?.focus();
  };
  return (
    <section aria-label="Canvases" class="run">
      <div class="player">
        <button type="button" onClick={() => (isPlaying.value ? scrub(step) : play(step === newest && !run.isRunning.value ? 0 : step))}>
          {isPlaying.value ? "Pause" : "Play"}
        </button>
        <label class="scrubber">
          <span>
            Step {step} of {total}
          </span>
          <input
            type="range"
            min={0}
            max={Math.max(total, 1)}
            value={step}
            aria-valuetext={`step ${step} of ${total}`}
            onInput={(event) => scrub(Math.min(Number(event.currentTarget.value), newest))}
          />
        </label>
        <label>
          Shown in
          <select value={pace.value} onChange={(event) => (pace.value = Number(event.currentTarget.value))}>
            {PACES.map((seconds) => (
              <option value={seconds}>{seconds === 0 ? "as it comes" : `${seconds} s`}</option>
            ))}
          </select>
        </label>
        <label>
          Colours tell
          <select value={colours.value} onChange={(event) => (colours.value = event.currentTarget.value as keyof typeof COLOURS)}>
            {Object.entries(COLOURS).map(([name, words]) => (
              <option value={name}>{words}</option>
            ))}
          </select>
        </label>
      </div>
      <p class="facts">
        <strong>{PHASES[run.phase.value]}</strong>
        {accepted?.model && ` · ${accepted.model.name}@${accepted.model.version}`}
        {accepted?.sampling?.sampler.case && ` · ${accepted.sampling.sampler.case}`}
        {accepted?.sampling?.seed !== undefined && ` · seed ${accepted.sampling.seed}`}
      </p>
      <p role="status" class={run.phase.value === "failed" ? "problem" : "facts"}>
        {run.message.value}
      </p>
      <div class="row">
        {!isPlaying.value && accepted && (step < newest || run.phase.value === "stopped" || run.phase.value === "failed") && (
          <button type="button" onClick={goOn}>
            Go on from here
          </button>
        )}
        {isWhole && canvases.length > 1 && (
          <button
            type="button"
            onClick={() =>
              void rank(run)
                .then((nats) => (worth.value = { of: run, nats }))
                .catch((error: unknown) => (problem.value = told(error)))
            }
          >
            Rank by likelihood
          </button>
        )}
        <button type="button" onClick={() => void copy(location.href)}>
          Copy link
        </button>
      </div>
      <Legend />
      <div class="canvases">
        {order.map((at) => {
          const canvas = canvases[at];
          const worth = nats && `log-likelihood ${(-(nats[at] ?? NaN)).toFixed(1)} nats`;
          return canvas && <CanvasView key={at} run={run} canvas={canvas} at={at} worth={worth} onEdit={edit} />;
        })}
      </div>
      <div class="heard" role="status">
        {isWhole && canvases.map(({ result }, at) => `Sample ${at + 1}: ${result?.text ?? ""}`).join(" ")}
      </div>
      {isWhole && <Candidates run={run} canvases={canvases} />}
    </section>
  );
}

const root = document.querySelector("#page");
if (root) render(<Page />, root);
