"""Write `tests/golden/forms.npz`: what HF transformers answers for the models of `forms.py`, float32 on the CPU.

Run `python -m tests.golden.make_forms`, with the packages that README.md names. The folder of every form is read by
transformers itself, so that names, layouts, scalings and tied heads are its own reading.
"""

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

from checkpoints import write_safetensors_directory
from tests.golden.forms import FORMS, MTP_FORMS, PROMPT, STORED_ROWS, form_case, form_config, form_tensors
from tests.golden.make import MIN_GAP, MIN_ROUTER_GAP, MTPHead, top_gap, watch_routers
from tests.golden.weights import golden_tokens

FILE = Path(__file__).parent / "forms.npz"


def read_with_transformers(form: str, folder: Path) -> torch.nn.Module:
    """Write the folder of a form and read it with transformers."""
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in form_tensors(form).items()]
    write_safetensors_directory(folder, form_config(form), entries)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **eager
    )
    unread = {key: value for key, value in found.items() if value}
    if unread:
        raise ValueError(f"{form}: {unread}")
    return model.eval()


def answers(form: str) -> dict[str, np.ndarray]:
    """Return tokens and logits of a form, for the first prompt whose answers are clear."""
    with tempfile.TemporaryDirectory() as folder:
        model = read_with_transformers(form, Path(folder) / form)
    head = MTPHead(model, form_tensors(form)) if form in MTP_FORMS else None
    margins = watch_routers(model, *([head] if head else []))
    for seed in range(200):
        margins.clear()
        tokens = torch.from_numpy(golden_tokens(form_case(form), PROMPT, seed)).long()
        found = {"logits": model(tokens[None], use_cache=False).logits[0]}
        if head:
            hidden = model.model(tokens[None], use_cache=False).last_hidden_state[0]
            found["mtp_logits"] = model.lm_head(head(hidden[:-1], tokens[1:]))
        arrays = {name: value.numpy() for name, value in found.items()}
        if top_gap(arrays) >= MIN_GAP and min(margins, default=1.0) >= MIN_ROUTER_GAP:
            stored = {name: array[STORED_ROWS] for name, array in arrays.items()}
            return {"tokens": tokens.numpy().astype(np.int32)} | stored
    raise RuntimeError(f"{form}: no prompt seed below 200 gives clear answers")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found: dict[str, np.ndarray] = {"transformers_version": np.array(transformers.__version__)}
    for form in FORMS:
        arrays = answers(form)
        found |= {f"{form}/{name}": array for name, array in arrays.items()}
        print(form, {name: array.shape for name, array in arrays.items()}, f"{arrays['logits'].std():.2f}", flush=True)
    np.savez_compressed(FILE, **cast("dict[str, Any]", found))
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
