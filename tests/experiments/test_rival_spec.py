"""Names of rivals and the settings that they stand for."""

import pytest

from mlx_svd.errors import MlxSvdError
from mlx_svd.experiments.rival_spec import rival_spec

COMMANDS = {
    "q3": "mlx_lm convert -q --q-bits 3 --q-group-size 64",
    "mixed_2_6": "mlx_lm convert -q --quant-predicate mixed_2_6 --q-group-size 64",
    "dynamic_quant@4.5": "mlx_lm dynamic_quant --target-bpw 4.5 --low-bits 3 --low-group-size 64 "
    "--high-bits 5 --high-group-size 64",
    "gptq2": "mlx_lm gptq --bits 2 --group-size 64",
    "awq3": "mlx_lm awq --bits 3 --group-size 64",
    "dwq3": "mlx_lm dwq --bits 3 --group-size 64 --learning-rate 0.0001 --batch-size 4",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_stands_for_one_command_of_mlx_lm(name):
    assert rival_spec(name).command == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_mlx_lm_has_every_flag_of_the_command(name, monkeypatch, capsys):
    import importlib
    import re

    program, *flags = COMMANDS[name].split()[1:]
    package = "mlx_lm" if program == "convert" else "mlx_lm.quant"
    module = importlib.import_module(f"{package}.{program}")
    monkeypatch.setattr("sys.argv", [program, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    known = set(re.findall(r"--?[a-z][a-z-]*", capsys.readouterr().out))
    assert {flag for flag in flags if flag.startswith("-")} <= known


@pytest.mark.parametrize(
    ("target", "low", "high"), [(5.0, 4, 5), (4.5, 3, 5), (3.2, 2, 3), (6.5, 5, 8), (8.0, 6, 8)]
)
def test_the_widths_of_dynamic_quant_enclose_the_target(target, low, high):
    spec = rival_spec(f"dynamic_quant@{target}")
    assert (spec.bits, spec.high_bits) == (low, high)
    assert low + 0.5 < target < high + 0.5


def test_smaller_groups_leave_fewer_bits_to_the_weights():
    assert rival_spec("dynamic_quant@5.0", group_size=32).bits == 3  # 1 bit per weight of scales


@pytest.mark.parametrize("name", ["q7", "q", "gptq3", "dwq8", "awq9", "mixed_2_4", "q4 ", "rtn4"])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(MlxSvdError, match=r"no such quantizer of mlx-lm.*mixed_2_6") as error:
        rival_spec(name)
    assert name in str(error.value)


@pytest.mark.parametrize("target", ["2.5", "8.5", "16"])
def test_targets_that_no_mixture_reaches_are_refused(target):
    with pytest.raises(MlxSvdError, match=r"between 2\.5 and 8\.5 bits per weight"):
        rival_spec(f"dynamic_quant@{target}")
