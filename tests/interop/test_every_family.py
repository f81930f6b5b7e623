"""Every row of the table of families is written and read again as it was, or refused with its reason."""

import numpy as np
import pytest
from small_models import FAMILIES, NOT_FOR, random_model

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.interop import load_hf, save_hf
from opendeep_jax.interop.gguf import load_gguf, save_gguf
from opendeep_jax.models.parameters import split

FORMATS = {
    "hf": (save_hf, load_hf),
    "gguf": (lambda model, path: save_gguf(model, path, "f32"), load_gguf),
}


def arrays(model) -> dict[str, np.ndarray]:
    _, params, router_bias = split(model)
    return {name: np.asarray(array) for name, array in (params | router_bias).items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported_and_comes_back_or_is_refused_with_a_reason(family, form, tmp_path):
    (save, load), model = FORMATS[form], random_model(FAMILIES[family])
    if form in NOT_FOR.get(family, ()):
        with pytest.raises(ConfigError, match=NOT_FOR[family][form]):
            save(model, tmp_path / "model")
        assert not list(tmp_path.iterdir())
        return
    save(model, tmp_path / "model")
    read = load(tmp_path / "model")
    before, after = arrays(model), arrays(read)
    if model.config.tie_embeddings and "head.kernel" in after:  # the file has the head all the same
        np.testing.assert_array_equal(after.pop("head.kernel"), before["embedding.embedding"].T)
    left_out = before.keys() - after.keys()
    assert after.keys() <= before.keys() and all(form == "gguf" and name.startswith("mtp.") for name in left_out)
    reordered = read.config.attention.rope.interleaved != model.config.attention.rope.interleaved
    for name, array in after.items():
        if reordered and name.endswith(("attention.query", "attention.key")):  # as test_gguf.py has it
            array, before[name] = np.sort(array), np.sort(before[name])
        offset = name.endswith("norm.scale") and model.config.norm != "rms"  # the file holds 1 + weight
        np.testing.assert_allclose(array, before[name], rtol=0, atol=1e-6 if offset else 0, err_msg=name)
