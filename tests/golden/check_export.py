"""Checks directories that `save_hf` wrote with transformers itself: python tests/golden/check_export.py DIR [FIXTURE]

Each must load without a missing, unexpected or misshapen key; with a fixture's directory beside it, its tensors must be
that fixture's to the bit and its logits those that transformers computed then. Needs what
make_families.py needs. With `--all WHERE`, every WHERE/NAME is checked against the fixture of that name.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

GOLDEN = Path(__file__).parent


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's files."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def check(directory: Path, fixture: Path | None) -> str:
    """Raises AssertionError where the directory is not what it should be; returns what was found."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    # Transformers has no place for DeepSeek's MTP module, the layer after the last; it skips the hub's own, too.
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    report["unexpected_keys"] = {key for key in report["unexpected_keys"] if not key.startswith(mtp)}
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    if fixture is None:
        return "loads"
    saved, original = tensors_of(directory), tensors_of(fixture)
    packed = {name for name in original if name.endswith(("_blocks", "_scales"))}
    repeated = {name for name in saved if name.endswith((".embed_tokens.weight", "shared_head.head.weight"))}
    repeated.discard("model.embed_tokens.weight")
    unpacked = {name.removesuffix("_blocks").removesuffix("_scales") for name in packed}
    assert saved.keys() - repeated - unpacked == original.keys() - packed, saved.keys() ^ original.keys()
    for name, tensor in original.items():
        if name not in packed:
            assert tensor.dtype == saved[name].dtype and torch.equal(tensor, saved[name]), name
    expected = np.load(fixture / "expected.npz")
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"]).long(), use_cache=False).logits.numpy()
    difference = np.abs(logits - expected["logits"]).max()
    assert difference < 1e-6, difference
    return f"{len(original)} tensors equal, logits differ by {difference:.1e}"


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.argv[1] == "--all":
        for path in sorted(Path(sys.argv[2]).iterdir()):
            fixtures = [found for found in (GOLDEN / path.name, GOLDEN / "families" / path.name) if found.is_dir()]
            print(f"{path.name:24} {check(path, fixtures[0])}")
    else:
        print(check(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None))
