"""Names that a user of version 0.1 could have imported still can be, with a warning that says where they are now."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from vlmrewrite.moved import GONE, LEFT, MOVED, RENAMED

ROOT = Path(__file__).parents[2]

OLD = """
admission: admit
anatomy: Anatomy Layer analyse axis needed reachable same value where
attend: FAR FEW POSITIONAL Seen attend seen seen_everywhere seen_masked
bench.cases: Case KEPT SAMPLED SIZES Setting Size TEXT operator size_of
bench.choosers: regions sample score
bench.contenders: attention decode gather restore
bench.kernels: AHEAD FAMILIES FLUSHED KINDS PATIENCE bench_kernels
bench.models: Row UNMODIFIED bench device_name memory_peak memory_reset
blocks: ATTRIBUTE Block LayerCopy Weights build decoder_layers parameter_inputs
budget: Budget Depth Layers T check_depth chosen_layers frozen_pass layer_index tokens_kept
cache: PositionCache PositionLayer Shared T
call: Call
capture: IMPLEMENTATION LIMIT TracedCall attention_forward attention_swapped decoder_configs mask_forward register
    running tracing_options with_images without_images
catalogue: passes recipe_data recipes
census: Census
checkpoint: RECIPE WEIGHTS load_blocks save_blocks
choice: Choice DECODE DTYPES Kernels LARGEST_HEAD choose unfit
cli: AsJson Device Dtype ImageTokens Model ModelFolder app apply bench commands inspect passes recipes
complaints: blamed_on choice complaints shown
costs: LayerCost costs
decoding: decode_attention
dialect: ATTENTION KV_APPEND attend attention attention_fake attention_flops attention_received checked everywhere
    greedy_flops kv_append like_member member per_image positions relative_index restore select token_index
    top_attention visible
dispatch: Parted part
emit: Extra SetEmitter SetNodes vlm
encode: Encoded EncoderFeatures encode_images encoded_images
formatting: byte_size describe span table
gathering: gather
grid: grids
inplace: InPlace Write kv_write
inspection: Shape config_file image_tokens profile_folder prompt_inputs read_config skeleton summary traced_prompt
install: Stage applied applied_recipe apply calibrate kept_tokens last_call layer_masks planned_lengths prompt_ends
    report restore routing verify
installed: Installed Ran
kernels: LEAST interpreted launcher missing
kernels.attention: attention_forward_kernel positional_attention
kernels.decode: DEFAULT_PROCESSORS LOG2E capped decode_attention processors splits
kernels.detail: dape_inject
kernels.first_pick: aligned closest distances load mean ordered
kernels.gather: FAN MOST NUMBERS PIECES TILE gather restore
kernels.lookahead: EPSILON NEAR search
kernels.matching: PRECISION SPACE dape_cover gains
kernels.messages: NOTHING ROW ROW_BITS exchange message row_of take
kernels.quadtree: LOWEST cut dape_split joined moments refined
kernels.regions: ACROSS BLOCKS COLUMNS FIELDS FIRST MORE ROWS START block centre channels_of dape_pool handed key
    locate places region_owner spread table totals
kernels.sample: AHEAD BLOCK EACH FIELDS HELD KEPT WARPS WIDEST divprune_sample greedy sts_sample
kernels.score: ADDED BITS CAUSAL FULL SPLITS attention_received top_attention
layerwise: LayerProfile calibration check_plot profile
legalize: BLOCKS Rewritten legalize vlm with_blocks
loading: device_of dtype_of question read_images read_processor with_random_weights with_weights
lower: Lowered compiled lower positioned told
memory: Layout LiveBytes Tail fake peak_bytes
observer: Observed attention_mass observe
operators: KERNELS OPAQUE REFERENCES define
passes.dape: DAPE DEPTHS POOL POOL_NEEDS
passes.dape_losses: ALIGNMENT COUNTS Losses SOFTNESS contrast dape_loss occupancy
passes.dape_ops: Detail Matching TEXT_BLOCK WIDTH dape_cover dape_focus dape_inject dape_pool dape_split gains
passes.divprune: BLOCK DivPrune divprune_sample
passes.dpvr: DPVR
passes.fastv: FastV
passes.random: Random random_sample
passes.shortv: ShortV
passes.stride: Stride stride_sample
passes.sts: EPSILON STS sts_sample
passes.vica: CROSS ViCA
passes.visor: Confidence Routed Router THRESHOLD VISOR spend visor_router
passes.vtw: VTW
plan: FEATURES Pass Plan
positional: BLOCK attention_blocks positional_attention seen_by_position unhidden
program: Outcome Program program_of rewrite say
recipe: GROUP Recipe find_pass known_passes shipped_recipes
regions: SCALES affordable aligned bar coarsest density deviation match owners pool refined region_owner
    representatives sizes
report: Report make_report
room: LEAST Room SHARE alike
session: Backend Given Last Session resolve
stream: Stream StreamEmitter vlm
terminal: Commands Complaints print_json print_table
testing.agreement: Agreement SLACK extended forward_agreement generation_agreement logits_agreement
testing.aot: Compiled GRID SHARED SM80 SM90 TARGETS cases compiled dry_run main
testing.edited: EditMask edited
testing.interleaving: OFTEN PATIENCE interleaved
testing.interpreter: config guarded trustworthy
testing.models: END FAMILIES HIDDEN IMAGE PAD Pictures Row START Side TILE TinyVLM VIDEO VOCABULARY gemma3 internvl
    llava llava_next llava_qwen2 qwen2_5_vl smolvlm
testing.oracle: BranchMask InFloat64 LayerMasks NAME masked mlp_of oracle_logits
testing.strategies: Sets budgets depths pass_lists plans policies rows sides techniques
tokens: All Difference Image Intersection Last NEEDS Nothing Pair Policy Selection Text TokenSet Union Vision
    check_needs contains difference has_text intersection selections substitute text_part union vision_part
tokenwise: hidden_write refuse writes
traced: Graph Runner TRACED Traced refuse_packed tidy trace traced without_full_mask
wellformed: check propagate
words: Branch Chooser Edit LayerPlan
"""
"""The modules of version 0.1 and the public names that they defined."""

NAMES = [
    ("vlmrewrite.dialect", "define", "vlmrewrite.ops"),
    ("vlmrewrite.dialect", "per_image", "vlmrewrite.ops"),
    ("vlmrewrite.dialect", "like_member", "vlmrewrite.ops"),
    ("vlmrewrite.budget", "frozen_pass", "vlmrewrite.plan"),
    ("vlmrewrite.budget", "Budget", "vlmrewrite.plan"),
    ("vlmrewrite.budget", "Depth", "vlmrewrite.plan"),
    ("vlmrewrite.tokens", "Policy", "vlmrewrite.plan"),
    ("vlmrewrite.tokens", "Vision", "vlmrewrite.plan"),
    ("vlmrewrite.words", "Edit", "vlmrewrite.plan"),
    ("vlmrewrite.blocks", "Weights", "vlmrewrite.plan"),
    ("vlmrewrite.install", "routing", "vlmrewrite.runtime"),
    ("vlmrewrite.install", "prompt_ends", "vlmrewrite.runtime"),
    ("vlmrewrite.layerwise", "profile", "vlmrewrite.report"),
    ("vlmrewrite.cache", "PositionCache", "vlmrewrite.kvcache"),
    ("vlmrewrite.passes.dape_losses", "dape_loss", "vlmrewrite.passes.dape.losses"),
    ("vlmrewrite.testing.oracle", "oracle_logits", "vlmrewrite.oracle"),
    ("vlmrewrite.testing.interpreter", "trustworthy", "vlmrewrite.testing.triton.interpreter"),
]


@pytest.mark.parametrize(("old", "name", "new"), NAMES)
def test_old_names_can_be_imported_with_a_warning(old, name, new):

    module = importlib.import_module(old)
    with pytest.warns(DeprecationWarning, match=rf"{old}.{name} is now vlmrewrite\."):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(new), name)


def test_old_modules_are_attributes_of_their_package():
    import vlmrewrite.cache

    with pytest.warns(DeprecationWarning, match="vlmrewrite.kvcache"):
        assert vlmrewrite.cache.PositionCache is vlmrewrite.kvcache.PositionCache


def test_a_name_that_never_was_is_an_attribute_error():
    for old in MOVED | LEFT:
        for name in ("nothing", "_private", "__wrapped__"):
            with pytest.raises(AttributeError, match=f"has no attribute '{name}'$"):
                getattr(importlib.import_module(f"vlmrewrite.{old}"), name)


def listed() -> dict[str, list[str]]:
    lines = OLD.strip().replace("\n    ", " ").splitlines()
    return {old: names.split() for old, _, names in (line.partition(": ") for line in lines)}


def found(old: str, name: str) -> object:
    """What an old name is now; None if it is told that there is no such thing any more."""
    module = importlib.import_module(f"vlmrewrite.{old}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if f"{old}.{name}" not in GONE:
            return getattr(module, name)
        with pytest.raises(AttributeError, match=re.escape(f"{name!r}; it is gone: {GONE[f'{old}.{name}']}")):
            getattr(module, name)
        return None


def test_every_public_name_of_the_old_version_is_there_or_told_to_be_gone():
    pytest.importorskip("triton")
    names = {f"{old}.{name}" for old, names in listed().items() for name in names}
    assert len(names) > 450
    lost = {name for name in names if found(*name.rsplit(".", 1)) is None}
    assert lost == set(GONE)
    assert set(RENAMED) <= names
    assert set(MOVED) | set(LEFT) <= set(listed())


def test_what_a_message_about_a_gone_name_points_to_is_there():
    for text in GONE.values():
        for name in re.findall(r"vlmrewrite\.[\w.]*\w", text):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize(
    ("old", "name", "home"),
    [
        ("admission", "admit", "hf"),
        ("capture", "attention_swapped", "hf"),
        ("program", "say", "plan"),
        ("kernels", "missing", "ops"),
        ("passes.visor", "Confidence", "passes.visor.dispatch"),
        ("passes.dape", "DEPTHS", "passes.dape.technique"),
        ("recipe", "GROUP", "registry"),
    ],
)
def test_a_renamed_name_or_one_that_left_its_module_warns(old, name, home):
    with pytest.warns(DeprecationWarning, match=rf"vlmrewrite.{old}.{name} is now vlmrewrite\.(\S+); the old") as seen:
        value = getattr(importlib.import_module(f"vlmrewrite.{old}"), name)
    now = str(seen[0].message).split(" is now vlmrewrite.")[1].partition(";")[0]
    assert seen[0].filename == __file__
    assert value is getattr(importlib.import_module(f"vlmrewrite.{home}"), now.rpartition(".")[2])


@pytest.mark.parametrize("old", ["tokens", "budget", "words", "blocks", "anatomy", "inspection", "testing.oracle"])
def test_a_star_takes_the_old_names(old):
    taken: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=r" is now vlmrewrite\."):
        exec(f"from vlmrewrite.{old} import *", taken)
    assert {name for name in listed()[old] if f"{old}.{name}" not in GONE} <= set(taken)
    assert not {"annotations", "torch", "Any"} & set(taken)


BELOW = [
    ("vlmrewrite.testing.oracle", "oracle_logits"),
    ("vlmrewrite.testing.aot", "TARGETS"),
    ("vlmrewrite.passes.dape_ops", "dape_cover"),
    ("vlmrewrite.kernels.sample", "greedy"),
    ("vlmrewrite.kernels.decode", "processors"),
    ("vlmrewrite.bench.kernels", "KINDS"),
    ("vlmrewrite.bench.cases", "Case"),
    ("vlmrewrite.cli", "Model"),
]


@pytest.mark.slow
def test_an_old_name_below_a_package_that_nobody_imported_yet():
    pytest.importorskip("triton")
    code = "".join(f"import {old}; {old}.{name}; from {old} import {name}\n" for old, name in BELOW)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
