"""Golden groups G1 and G2: the U-Net's parameters, outputs and gradients."""

import pytest
import torch as th
from golden_data import (
    arrays,
    assert_close,
    assert_close_to_largest,
    assert_gradient_norms,
    fill,
    manifest,
)

from guided_diffusion.script_util import create_model

CASES = manifest("g1_unet.json")["cases"]
ARCHS = manifest("g2_keys.json")["archs"]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case):
    expected, info = arrays(f"g1_unet_{case}.npz"), CASES[case]
    model = fill(create_model(**info["config"]))
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
