"""What an adapter_config.json means, and what is refused by the name of its option."""

import json

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from raymerge.adapters.peft_config import check_config
from raymerge.errors import AdapterError, UnsupportedAdapterError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
PATHS = [f"model.layers.{i}.self_attn.{m}" for i in (0, 1, 11) for m in ("q_proj", "xq_proj", "k_proj")]


def test_scaling_is_alpha_over_rank_or_its_root():
    assert check_config(PLAIN, "a").scaling_of("x.q_proj") == 2.0
    assert check_config({**PLAIN, "use_rslora": True}, "a").scaling_of("x.q_proj") == pytest.approx(16 / 8**0.5)


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 4},
        {"layers.1.self_attn.q_proj": 4, "q_proj": 2},
        {"q_proj": 2, "layers.1.self_attn.q_proj": 4},
        {r"^model\.layers\.1\.self_attn\.q_proj": 4},
        {r".*\.1\..*": 3, "k_proj": 5},
        {r"q_proj|k_proj": 6},
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(pattern):
    settings = check_config({**PLAIN, "rank_pattern": pattern, "alpha_pattern": pattern}, "a")
    for path in PATHS:
        rank = pattern.get(get_pattern_key(pattern.keys(), path), 8)
        alpha = pattern.get(get_pattern_key(pattern.keys(), path), 16)
        assert settings.rank_of(path) == rank
        assert settings.scaling_of(path) == alpha / rank


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.(0|1)\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.11\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 11, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["blocks"]},
        {"target_modules": ["model.layers.1.self_attn.xq_proj"]},
    ],
    ids=str,
)
def test_targets_are_those_of_peft(targets):
    settings = check_config({**PLAIN, **targets}, "a")
    config = LoraConfig(**targets)
    for path in PATHS:
        found = check_target_module_exists(config, path)
        theirs = bool(found) and type(found).__name__ != "_ExcludedModule"
        assert settings.targets(path) == theirs


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_where_only_the_base_could_tell_every_module_is_a_target(targets):
    assert check_config({**PLAIN, "target_modules": targets}, "a").targets("anything.at.all")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "vera_only"), ("ensure_weight_tying", True),
        ("layer_replication", [[0, 4]]), ("target_parameters", ["x"]),
        ("trainable_token_indices", [1]), ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"), ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"), ("kasa_config", {"beta": 1e-4}), ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True), ("alora_invocation_tokens", [1]), ("arrow_config", {"top_k": 1}),
        ("megatron_config", {"x": 1}), ("loftq_config", {"loftq_bits": 4}), ("an_option_of_tomorrow", 3),
        ("an_option_of_tomorrow", 0),
    ],
    ids=str,
)  # fmt: skip
def test_an_option_that_changes_the_delta_is_refused_by_name(option, value):
    with pytest.raises(UnsupportedAdapterError, match=rf"persona_7: .*{option}") as refusal:
        check_config({**PLAIN, option: value}, "persona_7")
    assert str(value if not isinstance(value, list | dict) else "") in str(refusal.value)


def test_what_is_trained_beside_the_factors_is_understood():
    settings = check_config({**PLAIN, "bias": "all", "lora_bias": True, "modules_to_save": ["score", "norm"]}, "a")
    assert (settings.bias, settings.lora_bias, settings.modules_to_save) == ("all", True, ("score", "norm"))
    assert not settings.dora
    assert check_config({**PLAIN, "use_dora": True}, "a").dora
    with pytest.raises(UnsupportedAdapterError, match="use_dora and lora_bias"):
        check_config({**PLAIN, "use_dora": True, "lora_bias": True}, "a")


@pytest.mark.parametrize("value", [None, False, [], {}, ""], ids=str)
def test_an_unknown_option_that_is_off_is_passed_over(value):
    assert check_config({**PLAIN, "an_option_of_tomorrow": value}, "a").rank == 8


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_accepted(start):
    assert check_config({**PLAIN, "init_lora_weights": start}, "a").alpha == 16


def test_what_peft_writes_by_default_is_plain():
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    settings = check_config(json.loads(json.dumps(plain)), "a")
    assert (settings.rank, settings.alpha, settings.target_modules) == (4, 8, ("q_proj",))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": 0}, "r is not a rank"), ({"r": "8"}, "r is not a rank"), ({"r": True}, "r is not a rank"),
        ({"lora_alpha": None}, "lora_alpha"), ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\[q_proj\]"), ({"rank_pattern": [1]}, "rank_pattern"),
        ({"target_modules": "(unclosed"}, "cannot be understood"), ({"target_modules": 3}, "cannot be understood"),
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_value_is_named(change, named):
    with pytest.raises(AdapterError, match=f"^a: .*{named}") as refusal:
        check_config({**PLAIN, **change}, "a")
    assert not isinstance(refusal.value, UnsupportedAdapterError)


def test_a_config_that_is_no_mapping_is_refused():
    with pytest.raises(AdapterError, match="not a mapping"):
        check_config([PLAIN], "a")


REAL = {
    "lora-rank32.json": None,  # named for its rank, and a DoRA all the same
    "lora-rank64-rslora.json": None,
    "lora-rank10-target-mlp.json": None,
    "lora-rank32-dora.json": None,
    "lora-rank32-kasa.json": "kasa_config",
    "lora-rank14-target-mlp-bdlora.json": "use_bdlora",
    "adalora-rank32.json": "ADALORA",
    "ia3-default.json": "IA3",
    "loha-rank32.json": "LOHA",
    "lokr-rank32-factor4-lr0.003.json": "LOKR",
    "oft-rank32.json": "OFT",
    "prefixtuning-lr_0.001.json": "PREFIX_TUNING",
    "vblora-bank1024-lr5e4.json": "VBLORA",
    "vera-default.json": "VERA",
}

DORA = ("lora-rank32.json", "lora-rank32-dora.json")  # read with their base, refused without (test_dora.py)


def test_real_configurations_are_accepted_or_refused_for_the_right_reason(test_data):
    found = sorted((test_data / "adapter-configs").glob("*.json"))
    assert {file.name for file in found} == set(REAL)
    for file in found:
        config, reason = json.loads(file.read_text()), REAL[file.name]
        if reason is None:
            settings = check_config(config, file.name)
            assert settings.rank == config["r"]
            assert settings.use_rslora == config["use_rslora"]
            assert settings.dora == config["use_dora"] == (file.name in DORA)
        else:
            with pytest.raises(UnsupportedAdapterError, match=reason):
                check_config(config, file.name)
