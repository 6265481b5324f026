"""A DeepSpeed JSON is read once: right values resolve, and a mistake is one line with the numbers and the way out."""

import copy
import json

import pytest
from edited_jsons import CONFIGS, WRONG, edited

from lbsgd.config.json_file import read_json, write_json
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan, plan_for
from lbsgd.config.schema import Recipe
from lbsgd.errors import ConfigError


def test_8k_is_the_papers_run_on_256_gpus():
    plan = Plan.read(CONFIGS / "8k.json", world_size=256)
    assert (plan.global_batch, plan.num_workers, plan.per_worker_batch) == (8192, 256, 32)
    assert (plan.micro_batch, plan.accumulation_steps) == (32, 1)
    assert plan.schedule.reference_lr == 3.2
    assert plan.iterations_per_epoch == 156 and plan.num_iterations == 14_040
    assert plan.schedule.warmup_iterations == 780
    assert plan.schedule.decay_iterations == (4680, 9360, 12480)
    assert (plan.precision, plan.zero_stage) == ("fp16", 1)
    assert plan.changes == () and plan.warnings == ()


@pytest.mark.parametrize("world_size, micro_batch, passes", [(256, 32, 1), (8, 256, 4), (2, 32, 128), (1, 8192, 1)])
def test_the_number_of_gpus_and_the_micro_batch_change_only_the_passes(world_size, micro_batch, passes):
    plan = Plan.read(CONFIGS / "8k.json", world_size, overrides=Overrides(micro_batch=micro_batch))
    assert (plan.num_workers, plan.accumulation_steps) == (256, passes)
    assert plan.identity() == Plan.read(CONFIGS / "8k.json", 256).identity()


def test_every_shipped_json_is_read_without_a_change_and_up_to_8k_images_without_a_warning():
    for path in CONFIGS.glob("**/*.json"):
        plan = Plan.read(path, world_size=1 if path.stem == "mask_rcnn_2" else 2)  # it has one worker
        assert plan.changes == (), path
        assert bool(plan.warnings) == (plan.global_batch > 8192 or path.parent.name == "ablations"), path


def test_other_data_derives_the_iterations_again_and_says_so():
    plan = Plan.read(CONFIGS / "8k.json", 8, num_images=100_000)
    assert plan.iterations_per_epoch == 12 and plan.schedule.warmup_iterations == 60
    assert plan.config["scheduler"]["params"]["warmup_num_steps"] == 60
    assert plan.changes == ("scheduler.params.warmup_num_steps: 780 -> 60", "lbsgd.num_images: 1281167 -> 100000")


def test_another_global_batch_derives_every_dependent_number_again():
    plan = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(global_batch=4096, resolution=160, seed=7))
    assert plan.schedule.reference_lr == pytest.approx(1.6) and plan.schedule.warmup_iterations == 5 * 312
    assert plan.recipe.augmentation.resolution == 160 and plan.recipe.seed == 7
    assert "optimizer.params.lr: 3.2 -> 1.6" in plan.changes
    assert "scheduler.params.warmup_num_steps: 780 -> 1560" in plan.changes


@pytest.mark.parametrize("name, kind", [("8k", "gradual"), ("ablations/8k_constant_warmup", "constant")])
def test_a_global_batch_of_base_batch_takes_no_warmup(name, kind):
    plan = Plan.read(CONFIGS / f"{name}.json", 8, overrides=Overrides(global_batch=256))
    assert plan.schedule.warmup_kind == "none" and plan.schedule.reference_lr == 0.1
    assert f'lbsgd.warmup.kind: "{kind}" -> "none"' in plan.changes


def test_a_global_batch_raised_above_base_batch_without_warmup_is_warned_of():
    plan = Plan.read(CONFIGS / "256.json", 8, overrides=Overrides(global_batch=8192))
    assert plan.schedule.warmup_kind == "none" and "1.1 points" in plan.warnings[0]


@pytest.mark.parametrize(
    "precision, stage, block", [("fp32", 1, None), ("bf16", 0, "torch_autocast"), ("fp16", 1, "fp16")]
)
def test_precision_switches_the_blocks(precision, stage, block):
    plan = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(precision=precision))
    assert (plan.precision, plan.zero_stage) == (precision, stage)
    assert {key for key in ("fp16", "torch_autocast") if key in plan.config} == ({block} if block else set())


def test_fp16_raises_the_stage_to_1_because_stage_0_does_not_train():
    plan = Plan.read(CONFIGS / "digits.json", 2, overrides=Overrides(precision="fp16"))
    assert plan.zero_stage == 1 and plan.config["fp16"] == read_json(CONFIGS / "8k.json")["fp16"]
    assert "zero_optimization.stage: 0 -> 1" in plan.changes
    divided = edited("8k_fp32", zero_optimization={"stage": 2})
    del divided["lbsgd"]["aggregation"]  # which stage 2 refuses
    assert Plan.read(divided, 2, overrides=Overrides(precision="fp16")).zero_stage == 2
    assert Plan.read(edited("digits", zero_optimization=None), 2).zero_stage == 0  # as in DeepSpeed


def test_precision_is_set_before_the_settings_so_that_they_are_judged_beside_it():
    overrides = Overrides(precision="fp32", settings=("zero_optimization.stage=0",))
    plan = Plan.read(CONFIGS / "8k.json", 8, overrides=overrides)
    assert (plan.precision, plan.zero_stage) == ("fp32", 0)
    overrides = Overrides(precision="fp16", settings=("fp16.initial_scale_power=8",))
    assert Plan.read(CONFIGS / "8k_fp32.json", 8, overrides=overrides).config["fp16"]["initial_scale_power"] == 8
    with pytest.raises(ConfigError, match="--precision fp32 and --set disagree, which gives fp16"):
        Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(precision="fp32", settings=("fp16.enabled=true",)))


def test_inverse_weight_decay_is_checked_and_derived_from_its_base():
    block = {"on_batch_norm": False, "scaling": "inverse_lr", "base": 0.0001}
    config = edited(lbsgd__weight_decay=block, optimizer__params__weight_decay=0.0001 / 32)
    plan = Plan.read(config, 8, overrides=Overrides(global_batch=2048))
    assert plan.config["optimizer"]["params"]["weight_decay"] == pytest.approx(0.0001 / 8)
    with pytest.raises(ConfigError, match=r"optimizer.params.weight_decay is 0.0001, .* makes it 3.125e-06"):
        Plan.read(edited(lbsgd__weight_decay=block), 8)


@pytest.mark.parametrize("changes, code, key, words", WRONG, ids=[f"{row[1]}-{row[2]}" for row in WRONG])
def test_what_cannot_be_right_is_refused_with_its_key_and_the_numbers(changes, code, key, words):
    with pytest.raises(ConfigError) as caught:
        Plan.read(edited(**changes), world_size=8)
    [line] = [line for line in str(caught.value).splitlines() if f": {key} " in line and line.endswith(f"[{code}]")]
    assert all(word in line for word in words), line


def test_unknown_keys_that_resemble_none_and_doubtful_numbers_are_warnings_and_a_note_is_none():
    plan = Plan.read(
        edited(
            my_project={"x": 1},
            zero_optimization__reduce_bucket_size=500_000_000,
            zero_optimization__overlap_comm=False,
        ),
        8,
    )
    assert [line.split()[0] for line in plan.warnings] == ["my_project", "zero_optimization.reduce_bucket_size"]
    config = edited(
        lbsgd__warmup={"kind": "none", "epochs": 0},
        scheduler__params__warmup_min_lr=3.2,
        scheduler__params__warmup_num_steps=1,
    )
    assert "1.1 points" in Plan.read(config, 8).warnings[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(world_size=3), ["256 workers", "3 processes", "fit: 1, 2, 4, 8, 16, 32, 64, 128, 256"]),
        (dict(world_size=2, overrides=Overrides(micro_batch=48)), ["is 48, no multiple of n = 32", "fit: 32, 64, 128"]),
        (dict(world_size=2, overrides=Overrides(micro_batch=96)), ["96", "fit: 32, 64, 128"]),
        (dict(world_size=1, overrides=Overrides(global_batch=100)), ["is 100, no multiple of n = 32", "96 or 128"]),
        (
            dict(world_size=1, num_images=8191),
            ["is 8192, more than the 8191 images", "a smaller train_batch_size (--global_batch)"],
        ),
        (dict(world_size=1, num_images=0), ["lbsgd.num_images is 0; give a number greater than 0"]),
        (dict(world_size=0), ["world_size is 0; give the number of processes, 1 or more"]),
        (dict(world_size=1, overrides=Overrides(seed=2**32)), ["lbsgd.seed", "less than 4294967296"]),
    ],
)
def test_what_does_not_fit_the_processes_or_the_data_names_what_would(arguments, words):
    with pytest.raises(ConfigError) as caught:
        Plan.read(CONFIGS / "8k.json", **arguments)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"train_batch_size": 8192,}', ["line 1, column 2", "trailing commas"]),
        ('{\n// kn\n"a": 1}', ["line 2, column 1", "comments"]),
        ('{"a": 1, "a": 2}', ['"a"', "twice"]),
        ('{"a": NaN}', ["line 1 NaN"]),
        ('{"NaN, \\" 1e999": 1,\n\n"b": [1e999]}', ["line 3 1e999", "too large"]),
        ('{"a":\n 1' + 5000 * "0" + "}", ["line 2 a whole number of 5001 digits"]),
        (" \n", ["is empty; give"]),
        ("[1]", ["no JSON object"]),
        ("{}", ["has no lbsgd block"]),
    ],
)
def test_what_is_not_strict_json_is_refused_with_its_place(tmp_path, text, words):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Plan.read(path, 1)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.json: cannot be read"):
        Plan.read(tmp_path / "nothing.json", 1)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text in UTF-8; save it so"):
        Plan.read(tmp_path / "binary.json", 1)


def test_a_plan_is_taken_as_it_is_for_its_own_processes_alone():
    file, flags = CONFIGS / "8k.json", Overrides(seed=7)
    plan = Plan.read(file, 8, 100_000, flags)
    assert plan_for(8, file, 100_000, flags) == plan and plan_for(8, plan, None, None) is plan
    for world_size in (4, 16):
        with pytest.raises(ConfigError, match=f"^the plan is for 8 processes, but {world_size} run; read it for"):
            plan_for(world_size, plan, None, None)
    for num_images, overrides in ((100_000, None), (None, flags)):
        with pytest.raises(ConfigError, match="8k: a plan has its num_images and overrides; give them to Plan.read"):
            plan_for(8, plan, num_images, overrides)


@pytest.mark.parametrize("written, iterations", [(7, 7), (None, 10)])
def test_a_log_has_a_line_for_every_10_iterations_unless_the_json_says_otherwise(written, iterations):
    assert Plan.read(edited(steps_per_print=written), 8).steps_per_print == iterations


def test_reading_leaves_the_callers_object_alone_and_the_plan_is_plain_data():
    config = edited()
    before = copy.deepcopy(config)
    plan = Plan.read(config, 8, overrides=Overrides(global_batch=256, precision="bf16"))
    assert config == before
    assert json.loads(json.dumps(plan.as_dict()))["global_batch"] == 256


# --- --set ------------------------------------------------------------------------------------------------------------


def test_settings_put_values_at_key_paths_and_derive_what_depends_on_them():
    settings = ("lbsgd.warmup.epochs=2", "train_batch_size=4096", "lbsgd.decay.factor=0.5")
    plan = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(settings=settings))
    assert plan.global_batch == 4096 and plan.schedule.reference_lr == 1.6
    assert plan.schedule.warmup_iterations == 2 * 312 and plan.schedule.decay_factor == 0.5
    assert set(plan.changes) == {
        "train_batch_size: 8192 -> 4096",
        "optimizer.params.lr: 3.2 -> 1.6",
        "scheduler.params.warmup_max_lr: 3.2 -> 1.6",
        "scheduler.params.warmup_num_steps: 780 -> 624",
        "lbsgd.warmup.epochs: 5 -> 2",
        "lbsgd.decay.factor: 0.1 -> 0.5",
    }


@pytest.mark.parametrize("text", [".".join("a" * 990) + "=1", "a=" + "[" * 990 + "]" * 990, "a=" + "[" * 100_000])
def test_a_setting_nested_without_end_is_one_line(text):
    with pytest.raises(ConfigError, match="^--set .*nested") as error:
        Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(settings=(text,)))
    assert len(str(error.value)) < 200


def test_the_resulting_json_can_be_fed_back(tmp_path):
    settings = ("lbsgd.linear_scaling.rule=sqrt", "train_batch_size=2048", "fp16=null", "zero_optimization.stage=0")
    plan = Plan.read(CONFIGS / "8k.json", 8, num_images=100_000, overrides=Overrides(settings=settings))
    write_json(tmp_path / "8k.json", plan.config)
    again = Plan.read(tmp_path / "8k.json", 8)
    assert again == plan and again.changes == () and again.precision == "fp32"
    assert again.schedule.reference_lr == pytest.approx(0.1 * 8**0.5)


def test_a_changed_run_does_not_keep_the_files_purpose_nor_the_papers_error():
    same = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(seed=3, precision="bf16", micro_batch=256))
    assert same.recipe.purpose.startswith("the paper's run") and same.summary()["purpose"] == same.recipe.purpose
    assert same.summary()["in the paper"].endswith("23.74 ± 0.09 %")
    for name, changed in (
        ("8k", Overrides(settings=("optimizer.params.momentum=0.8",))),
        ("ablations/8k_fixed_lr", Overrides(global_batch=4096)),  # the optimizer's lr stays
        ("8k", Overrides(settings=("lbsgd.warmup.epochs=2",))),
    ):
        other = Plan.read(CONFIGS / f"{name}.json", 8, overrides=changed)
        assert other.recipe.purpose is None and other.recipe.paper_error_pct is None, changed
        assert not {"purpose", "in the paper"} & other.summary().keys()
    assert same.identity()["recipe"].keys() == other.identity()["recipe"].keys()  # another purpose may resume
    assert same.identity() == Plan.read(edited(lbsgd__purpose=None, lbsgd__seed=3), 8).identity()
    told = Overrides(settings=("lbsgd.warmup.epochs=2", "lbsgd.purpose=a shorter warmup"))
    assert Plan.read(CONFIGS / "8k.json", 8, overrides=told).recipe.purpose == "a shorter warmup"


@pytest.mark.parametrize(
    "setting, words",
    [
        ("optimizer.params.lr=1.0", ["optimizer.params.lr", "follows", "3.2", "lbsgd.linear_scaling.base_lr"]),
        ("optimizer.params.lr=3.201", ["optimizer.params.lr", "follows", "3.2"]),
        ("scheduler.params.warmup_num_steps=5", ["warmup_num_steps", "follows", "780"]),
        ("gradient_accumulation_steps=4", ["gradient_accumulation_steps=4", "8 processes make it 32"]),
        ("train_batch_size=64", ["lbsgd.warmup.epochs=5", "make it 0"]),
        ("lbsgd.warmup.epoch=2", ["lbsgd.warmup.epoch", "unknown key"]),
        ("lbsgd.warmup.kind=none", ["lbsgd.warmup", "5 epochs"]),
        ("train_batchsize=64", ["did you mean train_batch_size"]),
        ("optimizer.type=Adam", ['"Adam"', "SGD"]),
        ("optimizer=null", ["optimizer.type", "is not set"]),
        ("communication_data_type=fp32", ["communication_data_type", "lbsgd sends gradients in their own", "D61"]),
        ("optimizer.type.name=SGD", ["optimizer.type is no block"]),
        ("train_batch_size", ["train_batch_size", "lbsgd.warmup.epochs=2"]),
        ("a..b=1", ["a..b"]),
        ("lbsgd.seed=NaN", ["NaN", "strict JSON"]),
        ("lbsgd.decay.epochs=[30, 1e999]", ["1e999", "strict JSON"]),
        (f"lbsgd.seed={'[' * 900}{']' * 900}", ["--set 'lbsgd.seed=[[[", "nested"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_one_that_follows_from_others_is_not_ignored(setting, words):
    with pytest.raises(ConfigError) as caught:
        Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(settings=(setting, "lbsgd.warmup.epochs=5")))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "overrides, words",
    [
        (Overrides(global_batch=4096, settings=("train_batch_size=2048",)), ["--global_batch 4096", "=2048"]),
        (Overrides(micro_batch=64, settings=("train_micro_batch_size_per_gpu=32",)), ["--micro_batch 64", "=32"]),
        (Overrides(resolution=160, settings=("lbsgd.augmentation.resolution=128",)), ["--resolution 160", "=128"]),
        (Overrides(resolution=160, settings=("lbsgd.augmentation=null",)), ["--resolution 160", "augmentation=null"]),
        (Overrides(seed=1, settings=("lbsgd.seed=2",)), ["--seed 1", "--set lbsgd.seed=2"]),
        (Overrides(settings=("lbsgd.seed=2", "lbsgd.seed=3")), ["--set lbsgd.seed=2", "--set lbsgd.seed=3"]),
        (
            Overrides(settings=("lbsgd.warmup.epochs=3", 'lbsgd.warmup={"kind": "gradual", "epochs": 2}')),
            ["--set lbsgd.warmup.epochs=3", "--set lbsgd.warmup="],
        ),
        (
            Overrides(settings=('lbsgd.warmup={"kind": "gradual", "epochs": 2}', "lbsgd.warmup.epochs=3")),
            ["--set lbsgd.warmup.epochs=3", "--set lbsgd.warmup="],
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused_by_name(overrides, words):
    with pytest.raises(ConfigError) as caught:
        Plan.read(CONFIGS / "8k.json", 8, overrides=overrides)
    said = str(caught.value)
    assert all(word in said for word in words) and "\n" not in said and "leave one of them out" in said, said


def test_flags_that_say_the_same_twice_agree():
    settings = ('lbsgd.warmup={"kind": "gradual", "epochs": 2}', "lbsgd.warmup.epochs=2", "train_batch_size=4096")
    plan = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(global_batch=4096, settings=settings))
    assert plan.global_batch == 4096 and plan.schedule.warmup_iterations == 2 * 312


def test_a_number_of_images_that_is_not_the_datas_is_refused_as_such():
    for settings, num_images in (("lbsgd.num_images=60000", 50_000), ("lbsgd.num_images=null", 50_000)):
        with pytest.raises(ConfigError, match=f"--set {settings} .* 50000 images of the data"):
            Plan.read(CONFIGS / "8k.json", 8, num_images, Overrides(settings=(settings,)))
    same = Plan.read(CONFIGS / "8k.json", 8, 50_000, Overrides(settings=("lbsgd.num_images=50000",)))
    assert same.num_images == 50_000


@pytest.mark.parametrize(
    "name, setting, instead",
    [
        ("8k", "optimizer.params.lr=1.0", "lbsgd.linear_scaling.base_lr"),
        ("8k", "scheduler.params.warmup_num_steps=5", "lbsgd.warmup.epochs"),
        ("detection/mask_rcnn_16", "scheduler.params.warmup_num_steps=5", "lbsgd.warmup.iterations"),
    ],
)
def test_a_number_that_follows_names_what_it_follows_from(name, setting, instead):
    with pytest.raises(ConfigError, match=f"set those instead, such as {instead}$"):
        Plan.read(CONFIGS / f"{name}.json", 8, overrides=Overrides(settings=(setting,)))


def test_the_number_of_passes_may_be_given_where_it_is_the_one_that_follows():
    given = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(settings=("gradient_accumulation_steps=32",)))
    written = Plan.read({**read_json(CONFIGS / "8k.json"), "gradient_accumulation_steps": 32}, 8)
    assert given.accumulation_steps == written.accumulation_steps == 32 and given.changes == written.changes == ()


@pytest.mark.parametrize(
    "flags, passes",
    [
        (dict(micro_batch=64), 16),
        (dict(global_batch=4096), 16),
        (dict(settings=("gradient_accumulation_steps=null",)), 32),
        (dict(settings=("gradient_accumulation_steps=32",)), 32),
    ],
)
def test_a_number_of_passes_of_the_json_does_not_count_where_flags_say_otherwise(flags, passes):
    written = {**read_json(CONFIGS / "8k.json"), "gradient_accumulation_steps": 4}  # the passes of 64 processes
    plan = Plan.read(written, 8, overrides=Overrides(**flags))
    assert plan.accumulation_steps == passes and "gradient_accumulation_steps" not in plan.config


def test_a_diagnostic_changes_no_number_so_the_file_keeps_its_purpose():
    overrides = Overrides(settings=("lbsgd.diagnostics.gradient_noise=100",))
    plan = Plan.read(CONFIGS / "8k_fp32.json", 8, overrides=overrides)
    assert plan.recipe.purpose and plan.recipe.paper_error_pct == [23.74, 0.09]


@pytest.mark.parametrize(
    "factor, points, words",
    [
        (1e-12, range(6, 36), "lbsgd.decay.factor 1e-12, 30 times, leaves no learning rate"),
        (10, [30, 60, 80], "lbsgd.decay.factor is 10.*; give a number of at most 1"),  # a divisor, as elsewhere
    ],
)
def test_decays_that_leave_no_learning_rate_or_raise_it_are_refused(factor, points, words):
    settings = f"lbsgd.decay.factor={factor}", f"lbsgd.decay.epochs={[*points]}"
    with pytest.raises(ConfigError, match=words):
        Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(settings=settings))


def test_eta_0_is_named_only_where_a_warmup_begins_there():
    assert Plan.read(CONFIGS / "8k.json", 8).summary()["learning rate"] == "η = 3.2 (linear rule), from η0 = 0.1"
    summary = Plan.read(CONFIGS / "ablations/8k_no_warmup.json", 8).summary()
    assert (summary["learning rate"], summary["warmup"]) == ("η = 3.2 (linear rule)", "none")


def test_a_warmup_that_rounds_to_nothing_is_none_and_warned_of():
    plan = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(settings=("lbsgd.warmup.epochs=0.001",)))
    assert plan.summary()["warmup"] == "none" and "η0" not in plan.summary()["learning rate"]
    [warning] = plan.warnings
    assert "lbsgd.warmup.epochs is 0.001, which is no iteration of 8192 images" in warning


def test_a_setting_equal_to_what_follows_is_accepted():
    plan = Plan.read(CONFIGS / "8k.json", 8, overrides=Overrides(settings=("optimizer.params.lr=3.2", "lbsgd.seed=0")))
    assert plan.changes == ()


@pytest.mark.parametrize("text", ["epochs=2", "warmup.epochs=2", 'warmup={"kind": "none", "epochs": 0}', "seed=3"])
def test_a_setting_that_lacks_its_first_word_is_refused(text):
    """DeepSpeed would ignore the key, and the whole schedule would run."""
    key = text.partition("=")[0]
    with pytest.raises(ConfigError, match=f"did you mean lbsgd.{key}[?]"):
        Overrides(settings=(text,)).values()
    assert Overrides(settings=(f"{key}=null",)).values() == {key: None}  # removes the key from the JSON
    assert Overrides(settings=(f"lbsgd.{text}",)).values()


def test_no_key_of_the_block_is_one_of_deepspeeds_too():
    from lbsgd.config.accepted.schema import accepted

    assert not accepted().top_level & set(Recipe.model_fields)
