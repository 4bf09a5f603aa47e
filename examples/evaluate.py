"""Perplexity of a model and of its compressed version, on the calibrated text and on another."""

from _common import CALIBRATION, DATA, MODEL, OUT
from transformers import AutoModelForCausalLM, AutoTokenizer

import camera
from camera.evaluation.perplexity import perplexity

camera.compress(
    MODEL, "camera_p", OUT / "smaller", sparsity=0.4, calibration=CALIBRATION, data=DATA
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
for name, folder in (("original", MODEL), ("compressed", OUT / "smaller")):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for corpus in ("wikitext2", "c4"):
        # Two blocks are an example. Leave `limit` out to measure the whole text.
        measured = perplexity(model, tokenizer, corpus=corpus, data=DATA, limit=2, progress=False)
        print(f"{name:>10}  {corpus:<10} {measured['perplexity']:.2f}")
