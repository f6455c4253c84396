# SPDX-License-Identifier: Apache-2.0
"""What a model shares: its contents, and its card, README.md, with metadata of the Hub."""

import dataclasses

from dlm_jax.diffusion import model
from dlm_jax.inference import pretrained
from dlm_jax.inference.trained_model import TrainedModel

CARD = """---
library_name: dlm_jax
pipeline_tag: text-generation
tags:
- dlm_jax
- jax
- diffusion
- text-diffusion
---

# {title}

A model of text by dlm_jax: {kind}.

```python
import dlm_jax

lm = dlm_jax.load("FOLDER_OR_OWNER/NAME")
print({call})
```

| | |
|---|---|
{rows}

`config.json` holds the whole config of the training, its step and the checksum of the
weights. The weights are averaged over the training. Say here where the texts come from,
their licence, and what the model is not for.
"""


def card(lm: TrainedModel, dtype: str) -> str:
    """Returns the card of a model whose weights are saved in dtype."""
    config, data = lm.config, lm.config["data"]
    kind = "autoregressive" if lm.cfg.causal else "continuous diffusion"
    facts = {
        "Parameters": f"{model.count(lm.ema):,}, saved in {dtype}",
        "Network": f"{lm.cfg.layers} layers of width {lm.cfg.hidden_dim}",
        "Vocabulary": f"{lm.tokenizer.vocab_size} tokens ({data.get('tokenizer')})",
        "Length": f"{lm.length} tokens, START and END included",
        "Texts": str(data.get("source")),
        "Objective": str(config["loss"].get("objective")),
        "Steps": f"{lm.step:,}",
        "Classifiers": ", ".join(sorted(lm.classifiers)) or "none",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    call = "lm.translate(source)" if lm.cfg.known_source else "lm.sample(4, seed=0)"
    title = "A text model of dlm_jax"
    return CARD.format(title=title, kind=kind, rows=rows, call=call)


def contents(lm: TrainedModel, dtype: str) -> pretrained.Pretrained:
    """Returns what a folder of this model holds, its classifiers among it."""
    parts = {"ema": lm.ema, "schedule_state": lm.schedule_state}
    classifiers = {}
    for task, own in lm.classifiers.items():
        record = {"model": dataclasses.asdict(own.cfg), "labels": own.vocab.to_dict()}
        classifiers[task] = (record, pretrained.flatten({"ema": own.params}))
    return pretrained.Pretrained(
        lm.config,
        lm.tokenizer,
        pretrained.flatten(parts),
        lm.step,
        lm.lengths,
        classifiers,
        card(lm, dtype),
    )
