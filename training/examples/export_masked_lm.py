"""Exports a masked language model of Hugging Face (ALBERT, BERT, ModernBERT and others) as a bundle that the server serves.

Usage: export_masked_lm.py MODEL BUNDLE. Needs torch, transformers, onnx, onnxscript and tokenizers. MODEL is a folder or a
name of the hub, BUNDLE the folder to make, `<repository>/<name>/<version>`. A network that fills in masks has learned
p(x0 = y | the rest), which is what an absorbing graph asks for; how far its text is to be trusted where most of it is
masked, only trying tells.
"""

import argparse
import hashlib
import json
from pathlib import Path

import onnx
import torch
from torch import nn

# What families call their marks: padding and unknown words are never drawn, the others stand around every text.
BEFORE, AFTER, MASK = ("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[MASK]", "<mask>")
NEVER = ("[PAD]", "<pad>", "[UNK]", "<unk>")


class Rows(nn.Module):
    """Logits of the wanted positions alone: heads over a vocabulary are dear."""

    # Where a family's head is; of others all rows are computed.
    HEADS = {
        "albert": lambda model: model.predictions,
        "bert": lambda model: model.cls,
        "modernbert": lambda model: nn.Sequential(model.head, model.decoder),
    }

    def __init__(self, model):
        super().__init__()
        self.model = model
        head = self.HEADS.get(model.config.model_type)
        self.head = head(model) if head else None

    def forward(self, tokens, positions):
        if self.head is None:
            return self.model(input_ids=tokens).logits.flatten(0, 1)[positions]
        hidden = self.model.base_model(input_ids=tokens)[0]
        return self.head(hidden.flatten(0, 1)[positions])


def marks(vocabulary):
    """Special tokens by what they are for."""
    ids = lambda names: [vocabulary[name] for name in names if name in vocabulary]
    if len(ids(MASK)) != 1:
        raise SystemExit(f"the vocabulary has not one of {MASK}")
    unused = [id for word, id in vocabulary.items() if word.startswith("[unused")]
    before, after = ids(BEFORE)[:1], ids(AFTER)[:1]
    return ids(MASK)[0], {"before": before, "after": after}, sorted({*ids(NEVER), *before, *after, *unused})


def vocabulary_of(folder, split):
    """Words by id, and the tokenizer as `tokenizer.json` where there is one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = folder / "vocab.txt"
    if split and words.is_file():
        vocabulary = {word: id for id, word in enumerate(words.read_text().splitlines())}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), "removed", invert=True)
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([word for word in (*MASK, *BEFORE, *AFTER) if word in vocabulary])
    elif (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    return tokenizer.get_vocab(), tokenizer.to_str()


def without_traces(path):
    """Takes out what the exporter noted of each node: most of a small file, and the paths of this machine."""
    model = onnx.load(path)
    for entry in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]
    onnx.save(model, path)


def export(model, bundle, name, vocabulary, tokenizer=None):
    """Writes the bundle of `model`, an `AutoModelForMaskedLM`."""
    config = model.eval().config
    mask, frame, excluded = marks(vocabulary)
    bundle.mkdir(parents=True)
    example = (torch.full((2, 8), mask), torch.tensor([0, 9, 15]))
    batch, longest, rows = (torch.export.Dim(dim, min=1) for dim in ("batch", "length", "rows"))
    torch.onnx.export(Rows(model), example, bundle / "model.onnx", dynamo=True, external_data=False,
                      input_names=["tokens", "positions"], output_names=["log_score"],
                      dynamic_shapes={"tokens": {0: batch, 1: longest}, "positions": {0: rows}})
    without_traces(bundle / "model.onnx")
    if tokenizer:
        (bundle / "tokenizer.json").write_text(tokenizer)
    manifest = {
        "format": 1, "name": name, "graph": "absorbing", "schedule": {"type": "loglinear", "eps": 1e-3},
        "parameterization": "mean", "time_conditioned": False, "vocab_size": config.vocab_size, "mask_token": mask,
        "excluded_tokens": excluded, "frame": frame,
        "max_length": config.max_position_embeddings - len(frame["before"]) - len(frame["after"]),
        # One position at a time: such networks were not trained to fill several that depend on each other.
        "defaults": {"sampler": "first-hitting"},
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in bundle.iterdir()},
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", help="name to serve it under; without, the folder's above the version")
    parser.add_argument("--split", help="for models with a vocab.txt alone: a regular expression of one token")
    arguments = parser.parse_args()

    from huggingface_hub import snapshot_download
    from transformers import AutoModelForMaskedLM

    folder = Path(arguments.model)
    if not folder.is_dir():
        folder = Path(snapshot_download(arguments.model))
    vocabulary, tokenizer = vocabulary_of(folder, arguments.split)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    export(model, arguments.bundle, arguments.name or arguments.bundle.parent.name, vocabulary, tokenizer)


if __name__ == "__main__":
    main()
