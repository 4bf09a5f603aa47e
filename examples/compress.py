"""Prune a model by 40 % of its experts' parameters, load the result, let it go on with a text."""

from _common import CALIBRATION, DATA, MODEL, OUT
from transformers import AutoModelForCausalLM, AutoTokenizer

import camera

# One layer is in memory at a time. Any method by name: "heapr", "reap", "camera_plus", ...
result = camera.compress(
    MODEL, "camera_p", OUT / "smaller", sparsity=0.4, calibration=CALIBRATION, data=DATA
)
print(f"removed {result.sparsity['moe']:.1%} of the experts, {result.sparsity['model']:.1%} in all")
print(f"{result.bytes['dense'] / 1e6:.1f} MB -> {result.bytes['compressed'] / 1e6:.1f} MB")

# `import camera` has taught transformers the format.
model = AutoModelForCausalLM.from_pretrained(OUT / "smaller")
tokenizer = AutoTokenizer.from_pretrained(OUT / "smaller")
prompt = tokenizer("= Nifry Weler =\n\nNifry Weler likes to eat", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
