"""Golden groups G1 and G2: the U-Net's parameters, outputs and gradients."""

import golden_checks
import pytest
import torch as th
from golden_checks import UNETS, by_the_scripts
from golden_data import assert_all, fill, manifest

from guided_diffusion.script_util import create_model

ARCHS = manifest("g2_keys.json")["archs"]


def by_the_library(config):
    return fill(create_model(**config))


def channels_last(config):
    model = by_the_scripts(config)
    model.use_dtype(th.float32, channels_last=True)
    return model


@pytest.mark.parametrize("build", [by_the_library, by_the_scripts, channels_last])
@pytest.mark.parametrize("case", UNETS)
def test_outputs_and_gradients(case, build):
    assert_all(golden_checks.unet(case, build))


@pytest.mark.parametrize("case", UNETS)
def test_size(case):
    model = create_model(**UNETS[case]["config"])
    assert sum(p.numel() for p in model.parameters()) == UNETS[case]["n_params"]
    assert len(model.state_dict()) == UNETS[case]["n_keys"]


@pytest.mark.parametrize("arch", ARCHS)
def test_parameter_list(arch):
    info = ARCHS[arch]
    with th.device("meta"):
        model = create_model(**info["config"], learn_sigma=info["learn_sigma"])
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == info["keys"]


def test_float32_is_in_the_layout_that_gives_these_numbers():
    """Networks of the published configurations, which say use_fp16, as `precision: fp32` runs them."""
    model = by_the_scripts(UNETS["c02"]["config"])
    assert model.compute_dtype == th.float32
    assert all(p.is_contiguous() for p in model.parameters())
    model.use_dtype(th.bfloat16)
    model.use_dtype(th.float32)
    assert all(p.is_contiguous() for p in model.parameters())
