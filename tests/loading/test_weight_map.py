"""The map from published tensors to the parameter tree: complete, without overlap, and in the published shapes."""

import numpy as np
import pytest

from checkpoints.names import canonical_name
from mtpjax.config import ModelConfig
from mtpjax.hf_config import config_from_hf
from mtpjax.loading.loaded_model import param_shapes
from mtpjax.loading.weight_map import weight_map
from tests.golden.weights import golden_config
from tests.helpers.models import tiny_config
from tests.helpers.published_models import PublishedModel, moe_fused, moe_separate_experts

pytestmark = pytest.mark.fast

DENSE = tiny_config(moe=False, tied_embeddings=True)
MOE = tiny_config(moe=True)


@pytest.mark.parametrize("separate_experts", [False, True])
@pytest.mark.parametrize("cfg", [DENSE, MOE, MOE.without_mtp()], ids=["dense", "moe", "moe-no-mtp"])
def test_every_element_of_every_leaf_belongs_to_one_tensor(cfg: ModelConfig, separate_experts: bool) -> None:
    shapes = param_shapes(cfg)
    num_tensors = {path: np.zeros(shape, np.int64) for path, shape in shapes.items()}
    for location in weight_map(cfg, lambda name: separate_experts).values():
        part = num_tensors[location.path][location.index]
        assert part.size == np.prod(location.shape)
        num_tensors[location.path][location.index] += 1
    assert all((count == 1).all() for count in num_tensors.values())


@pytest.mark.parametrize("model", [moe_fused, moe_separate_experts])
def test_names_are_those_of_published_checkpoints(model: PublishedModel) -> None:
    case, tensors = model()
    published = {canonical_name(name): array.shape for name, array in tensors.items()}
    locations = weight_map(config_from_hf(golden_config(case)), published.__contains__)
    assert {name: location.shape for name, location in locations.items()} == published
