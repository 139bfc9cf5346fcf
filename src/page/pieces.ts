// How tokens read, as far as they have been asked for.
import { signal } from "@preact/signals";
import { diffusion } from "./api";
import type { ModelReference } from "./made/denoised/v1/model_reference_pb";

/** Tokens that one call asks for. */
const AT_ONCE = 4096;

/** The text of a model's tokens. */
export class Pieces {
  readonly known = signal(new Map<number, string>());
  #wanted = new Set<number>();
  #asking = false;

  constructor(readonly model: ModelReference | undefined) {}

  /** Asks for those of `tokens` that are not known yet. */
  want(tokens: Iterable<number>) {
    for (const token of tokens) if (!this.known.value.has(token)) this.#wanted.add(token);
    if (!this.#asking && this.#wanted.size > 0) void this.#ask();
  }

  async #ask() {
    this.#asking = true;
    try {
      while (this.#wanted.size > 0) {
        const tokens = [...this.#wanted].slice(0, AT_ONCE);
        // The first once more: at the beginning of a text many tokenizers leave out a token's space.
        const asked = { model: this.model, tokens: [tokens[0] ?? 0, ...tokens], pieces: true };
        const { pieces } = await diffusion.detokenize(asked);
        const known = new Map(this.known.value);
        tokens.forEach((token, at) => {
          known.set(token, pieces[at + 1] ?? "");
          this.#wanted.delete(token);
        });
        this.known.value = known;
      }
    } catch {
      // Asked for again with the next state; the result has its text from the server.
    } finally {
      this.#asking = false;
    }
  }
}
