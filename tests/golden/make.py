"""Write `tests/golden/<case>.npz`: what HF transformers answers for the models of `weights.py`, float32 on the CPU.

Transformers has no Qwen3.5 multi-token head, so that part is put together here from its decoder layer and norm.
Run `python -m tests.golden.make [case ...]`; README.md has the package versions and says what each array is.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from tests.golden.weights import CASES, EOS, golden_checksum, golden_config, golden_tensors, golden_tokens

HERE = Path(__file__).parent
PROMPT, PREFILL, DECODE, SHORT, DRAFT = 150, 70, 12, 5, 3
MIN_GAP = 2e-4  # twice the tolerance on logits, so that an argmax within tolerance is the same argmax
MIN_ROUTER_GAP = 1e-4  # between the last expert chosen and the first left out: a swap would be a jump, not a rounding
SHAKE, MAX_SHAKE = 2.0**-20, 1.2e-4  # see `shake`: rejects prompts where rounding alone could use up the tolerance
MAX_BYTES = 250_000


class MTPHead(nn.Module):
    """The multi-token head, parameters named as in a checkpoint after `mtp.`. Slot t pairs hidden t, token t+1.

    Takes the hidden state after the trunk's final norm; gives its own after `norm`, which the next draft step takes.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, np.ndarray]):
        super().__init__()
        config = copy.deepcopy(model.config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        layer_type, norm_type = type(model.model.layers[0]), type(model.model.norm)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = norm_type(size, eps)
        self.pre_fc_norm_hidden = norm_type(size, eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([layer_type(config, 0)])
        self.norm = norm_type(size, eps)
        self.eval()
        prefix = "mtp."
        load(self, {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)})
        assert config._attn_implementation == "eager", config._attn_implementation
        self._trunk = [model]  # in a list: shared, not a submodule

    def forward(self, hidden: Tensor, next_tokens: Tensor) -> Tensor:
        """hidden [T, D], next_tokens [T] -> hidden [T, D] after `norm`; slots and rotary positions are 0..T-1."""
        model = self._trunk[0]
        slots = len(next_tokens)
        embedding = model.model.embed_tokens(next_tokens)
        pair = torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], dim=-1)
        stream = self.fc(pair)[None]  # [1, T, D]
        rotary = model.model.rotary_emb(stream, torch.arange(slots)[None])
        causal = torch.full((slots, slots), -torch.inf).triu(1)[None, None]  # eager attention masks nothing by itself
        return self.norm(self.layers[0](stream, position_embeddings=rotary, attention_mask=causal))[0]


def load(module: nn.Module, tensors: dict[str, np.ndarray], tied: tuple[str, ...] = ()) -> None:
    """Set every parameter, or raise: none missing except `tied` names, none unexpected, none left untouched."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    found = module.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, strict=False)
    missing, unexpected = sorted(set(found.missing_keys) - set(tied)), sorted(found.unexpected_keys)
    unset = [name for name, parameter in module.named_parameters() if not parameter.isfinite().all()]
    if missing or unexpected or unset:
        raise ValueError(f"{type(module).__name__}: missing {missing}, unexpected {unexpected}, not set {unset}")


def build(case: str) -> tuple[nn.Module, MTPHead]:
    """The transformers model and the head, with the weights of the case."""
    raw = golden_config(case)
    tensors = golden_tensors(case)
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    model_type = getattr(transformers, raw["architectures"][0])
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = model_type._from_config(config, dtype=torch.float32, **eager).eval()
    trunk = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    load(model, trunk, tied=("lm_head.weight",) if raw["tie_word_embeddings"] else ())
    if raw["tie_word_embeddings"] != (model.lm_head.weight is model.model.embed_tokens.weight):
        raise ValueError(f"{case}: tie_word_embeddings is {raw['tie_word_embeddings']} but transformers did otherwise")
    return model, MTPHead(model, tensors)


def decode(model: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Cached greedy decoding: tokens fed [DECODE] and logits [DECODE + 1, V], row 0 from the end of the prompt."""
    out = model(prompt[None], use_cache=True)
    rows, fed = [out.logits[0, -1]], []
    for _ in range(DECODE):
        fed.append(rows[-1].argmax())
        out = model(fed[-1].reshape(1, 1), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(fed), torch.stack(rows)


def draft(model: nn.Module, head: MTPHead, hidden: Tensor, tokens: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """DRAFT greedy steps after a context of T: tokens [DRAFT] and logits [DRAFT, V].

    hidden [T, D] and tokens [T] are the trunk's; token is the one after them. Slots 0..T-2 hold the true pairs. Step 1
    pairs the last hidden state with `token` in slot T-1; step j pairs the head's own output of step j-1 with draft j-1
    in slot T-2+j. All slots are recomputed at every step, so no cache of ours can be wrong.
    """
    next_tokens = torch.cat([tokens[1:], token[None]])
    rows, drafted = [], []
    for _ in range(DRAFT):
        out = head(hidden, next_tokens)
        rows.append(model.lm_head(out[-1]))
        drafted.append(rows[-1].argmax())
        hidden = torch.cat([hidden, out[-1:]])
        next_tokens = torch.cat([next_tokens, drafted[-1][None]])
    return torch.stack(drafted), torch.stack(rows)


def run(case: str, model: nn.Module, head: MTPHead, seed: int) -> dict[str, np.ndarray]:
    """All arrays of a case for one prompt seed."""
    tokens = torch.from_numpy(golden_tokens(case, PROMPT, seed)).long()
    short = torch.from_numpy(golden_tokens(case, SHORT, seed)).long()
    hidden = model.model(tokens[None], use_cache=False).last_hidden_state[0]  # after the final norm
    logits = model(tokens[None], use_cache=False).logits[0]
    fed, decode_logits = decode(model, tokens[:PREFILL])
    next_token = logits[-1].argmax()
    drafted, draft_logits = draft(model, head, hidden, tokens, next_token)
    arrays = {
        "tokens": tokens,
        "logits": logits,
        "hidden": hidden,
        "decode_tokens": fed,
        "decode_logits": decode_logits,
        "short_tokens": short,
        "short_logits": model(short[None], use_cache=False).logits[0],
        "mtp_logits": model.lm_head(head(hidden[:-1], tokens[1:])),
        "next_token": next_token,
        "draft_tokens": drafted,
        "draft_logits": draft_logits,
        "prompt_seed": torch.tensor(seed),
    }
    kinds = {name: np.float32 if value.is_floating_point() else np.int32 for name, value in arrays.items()}
    return {name: value.numpy().astype(kinds[name]) for name, value in arrays.items()}


def top_gap(arrays: dict[str, np.ndarray]) -> float:
    """The smallest distance between the best and the second-best logit over all stored rows."""
    rows = np.concatenate([value for name, value in arrays.items() if name.endswith("logits")])
    best = np.sort(rows, axis=-1)
    return float((best[:, -1] - best[:, -2]).min())


def watch_routers(*modules: nn.Module) -> list[float]:
    """A list that receives, for every router call from now on, the smallest margin of its choice in logits."""
    margins: list[float] = []

    def record(router: nn.Module, _: object, out: tuple[Tensor, Tensor, Tensor]) -> None:
        ordered = out[0].sort(dim=-1, descending=True).values  # [tokens, experts]
        margins.append(float((ordered[:, router.top_k - 1] - ordered[:, router.top_k]).min()))

    for module in modules:
        for part in module.modules():
            if type(part).__name__.endswith("TopKRouter"):
                part.register_forward_hook(record)
    return margins


def cache_error(model: nn.Module, arrays: dict[str, np.ndarray]) -> float:
    """Cached decoding against one uncached pass over the same tokens: two roads in transformers, a floor for ours."""
    tokens = np.concatenate([arrays["tokens"][:PREFILL], arrays["decode_tokens"]])
    whole = model(torch.from_numpy(tokens).long()[None], use_cache=False).logits[0, PREFILL - 1 :].numpy()
    return float(np.abs(whole - arrays["decode_logits"]).max())


def shake(case: str, model: nn.Module, head: MTPHead, arrays: dict[str, np.ndarray]) -> float:
    """How far logits move when every embedding entry moves by a relative 2^-20, signs alternating: eight float32 steps.

    Tells how well-conditioned a prompt is. Now and then a DeltaNet output is nearly zero before its norm and the
    answer is mostly rounding error; such a prompt proves nothing about an implementation.
    """
    weight = model.model.embed_tokens.weight
    kept = weight.clone()
    signs = 1 - 2 * (torch.arange(weight.numel()).reshape(weight.shape) % 2)
    weight.mul_(1 + SHAKE * signs)
    moved = run(case, model, head, int(arrays["prompt_seed"]))
    weight.copy_(kept)
    return max(float(np.abs(moved[name] - value).max()) for name, value in arrays.items() if name.endswith("logits"))


def make(case: str) -> str:
    """Write one file, with the first prompt seed whose answers are all clear; return its row of the table."""
    model, head = build(case)
    margins = watch_routers(model, head)
    for seed in range(100):
        margins.clear()
        arrays = run(case, model, head, seed)
        gap, router_gap = top_gap(arrays), min(margins, default=float("inf"))
        generated = [*arrays["decode_tokens"], arrays["next_token"], *arrays["draft_tokens"]]
        clear = gap >= MIN_GAP and router_gap >= MIN_ROUTER_GAP and EOS not in generated
        if clear and (moved := shake(case, model, head, arrays)) <= MAX_SHAKE:
            break
    else:
        raise RuntimeError(f"{case}: no prompt seed below 100 gives clear answers; change the weights of the case")
    error = cache_error(model, arrays)
    notes = {
        "weights_crc32": np.uint32(golden_checksum(golden_tensors(case))),
        "config": np.array(json.dumps(golden_config(case))),
        "torch_version": np.array(torch.__version__),
        "transformers_version": np.array(transformers.__version__),
    }
    path = HERE / f"{case}.npz"
    np.savez_compressed(path, **cast("dict[str, Any]", arrays | notes))
    if path.stat().st_size > MAX_BYTES:
        raise RuntimeError(f"{path}: {path.stat().st_size} bytes, over {MAX_BYTES}")
    kinds = len(set(arrays["logits"].argmax(-1)))
    return (
        f"{case:9} {seed:4} {arrays['logits'].std():6.2f} {arrays['mtp_logits'].std():6.2f} "
        f"{gap:9.1e} {router_gap:11.1e} {kinds:7} {moved:7.1e} {error:9.1e} {path.stat().st_size:8}"
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print("case      seed    std  mtp std  min gap  router gap  argmaxs   shake  cache err    bytes")
    for case in sys.argv[1:] or CASES:
        print(make(case), flush=True)


if __name__ == "__main__":
    main()
