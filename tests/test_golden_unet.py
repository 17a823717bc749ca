"""Golden groups G1 and G2: the U-Net's parameters, outputs and gradients."""

import pytest
import torch as th
from golden_data import (
    arrays,
    as_the_scripts_build,
    assert_close,
    assert_close_to_largest,
    assert_gradient_norms,
    fill,
    manifest,
)

from guided_diffusion.script_util import create_model


def by_the_library(config):
    return fill(create_model(**config))


def by_the_scripts(config):
    config = dict(config)
    return as_the_scripts_build(config, {"learn_sigma": config.pop("learn_sigma", False)})[0]


CASES = manifest("g1_unet.json")["cases"]
ARCHS = manifest("g2_keys.json")["archs"]


def channels_last(config):
    model = by_the_scripts(config)
    model.use_dtype(th.float32, channels_last=True)
    return model


@pytest.mark.parametrize("build", [by_the_library, by_the_scripts, channels_last])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, build):
    expected, info = arrays(f"g1_unet_{case}.npz"), CASES[case]
    model = build(info["config"])
    assert sum(p.numel() for p in model.parameters()) == info["n_params"]
    assert len(model.state_dict()) == info["n_keys"]

    x = expected["x"].clone().requires_grad_()
    output = model(x, expected["t"], y=expected.get("y"))
    assert_close(output, expected["output"], what="output")
    (output**2).sum().backward()
    assert_close_to_largest(x.grad, expected["grad_x"], what="gradient of x")
    parameters = dict(model.named_parameters())
    for key, value in expected.items():
        if key.startswith("grad:"):
            assert_close_to_largest(parameters[key.removeprefix("grad:")].grad, value, what=key)
    assert assert_gradient_norms(model, info["grad_l2_norm"]) == set(info["grad_l2_norm"])

    if "t_float" in expected:
        with th.no_grad():
            assert_close(model(expected["x"], expected["t_float"]), expected["output_t_float"])


@pytest.mark.parametrize("arch", ARCHS)
def test_parameter_list(arch):
    info = ARCHS[arch]
    with th.device("meta"):
        model = create_model(**info["config"], learn_sigma=info["learn_sigma"])
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == info["keys"]


def test_float32_is_in_the_layout_that_gives_these_numbers():
    """Networks of the published configurations, which say use_fp16, as `precision: fp32` runs them."""
    model = by_the_scripts(CASES["c02"]["config"])
    assert model.compute_dtype == th.float32
    assert all(p.is_contiguous() for p in model.parameters())
    model.use_dtype(th.bfloat16)
    model.use_dtype(th.float32)
    assert all(p.is_contiguous() for p in model.parameters())
