"""The same comparisons with the authors' own classes, for whoever has their source: `pytest -m official`.

AUTOSEG_OFFICIAL_VOCO: a checkout of Luffy03/Large-Scale-Medical. AUTOSEG_OFFICIAL_NNSSL: one of MIC-DKFZ/nnssl.
AUTOSEG_OFFICIAL_PUMIT: one of function2-llx/PUMIT, branch master. AUTOSEG_OFFICIAL_DINOV3: one of facebookresearch/dinov3.
"""

import copy
import importlib
import importlib.util
import os
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pretrain.importers import primus
from pretrain.importers.pumit import read_tokenizer
from pretrain.importers.reading import read_weights
from pretrain.methods.pumit.tokenizer import Tokenizer, soft
from pretrain.networks.pumit_vit import timm_names
from pretrain.networks.sac import Spacing
from tests import layouts, official_pumit
from tests import test_pumit_values as pumit
from tests.test_importers import WRAPPERS, image, loaded, same, saved, swin_features

pytestmark = pytest.mark.official


def checkout(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a checkout")
    return Path(os.environ[variable])


def module_at(file: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def voco_head():
    """The authors' pretraining network, feature size 48: encoder and two projectors."""
    module = module_at(checkout("AUTOSEG_OFFICIAL_VOCO") / "Self-supervised/models/voco_head.py", "official_voco_head")
    torch.manual_seed(0)
    arguments = Namespace(in_channels=1, feature_size=48, dropout_path_rate=0.0, use_checkpoint=False, spatial_dims=3)
    return module.VoCoHead(arguments).eval()


@pytest.fixture
def nnssl_source(monkeypatch):
    """nnssl's architectures alone: what they import of the rest is the type of an argument."""
    monkeypatch.syspath_prepend(str(checkout("AUTOSEG_OFFICIAL_NNSSL") / "src"))
    stub = types.ModuleType("nnssl.experiment_planning.experiment_planners.plan")
    stub.ConfigurationPlan = object
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return lambda name: importlib.import_module(f"nnssl.architectures.{name}")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_encoder_of_the_official_voco_loads_bit_identical(wrapper, voco_head, tmp_path):
    backbone = voco_head.backbone
    state = backbone.state_dict()
    assert state.keys() == layouts.voco_encoder(layouts.swin()).keys()
    assert len(state) == 145
    network, report = loaded(read_weights(saved(tmp_path, WRAPPERS[wrapper](state))))
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    backbone.normalize = True  # the default of the transformer that the official forward pass uses
    assert same(swin_features(network), swin_features(backbone))


def test_the_official_dump_with_its_projectors_loads_bit_identical(voco_head, tmp_path):
    content = {"global_step": 3, "state_dict": layouts.prefixed("module.", voco_head.state_dict())}
    assert len(content["state_dict"]) == 157
    weights = read_weights(saved(tmp_path, content))
    assert len(weights.dropped) == 12
    voco_head.backbone.normalize = True
    assert same(swin_features(loaded(weights)[0]), swin_features(voco_head.backbone))


def test_our_table_of_resenc_l_is_the_official_one(nnssl_source, tmp_path):
    registry = nnssl_source("architecture_registry")
    torch.manual_seed(0)
    for name, make in (("ResEncL", registry.get_res_enc_l), ("NoSkipResEncL", registry.get_noskip_res_enc_l)):
        source = make(1, 1).eval()
        plan = layouts.adaptation_plan(name, None, keys=("encoder.stages", "encoder.stem"))
        path = saved(tmp_path, layouts.nnssl(source.state_dict(), plan, "BaseMAETrainer"))
        network, report = loaded(read_weights(path))
        assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
        x = image((32, 32, 64))
        source.encoder.return_skips = True  # the variant without skips gives the last map only
        with torch.no_grad():
            assert same(network.encoder(x), source.encoder(x))


def test_voco_of_nnssl_loads_bit_identical(nnssl_source, tmp_path):
    encoder = layouts.resenc().encoder
    source = nnssl_source("voco_architecture").VoCoArchitecture(encoder, encoder.output_channels)
    keys = ("encoder.stages", "encoder.stem")
    plan = layouts.adaptation_plan("ResidualEncoderUNet", layouts.SMALL_RESENC, keys=keys)
    weights = read_weights(saved(tmp_path, layouts.nnssl(source.state_dict(), plan, "VoCoTrainer")))
    x = image((16, 24, 16))
    with torch.no_grad():
        assert same(loaded(weights)[0].encoder(x), encoder(x))
    assert sum("projector" in name for name, _ in weights.dropped) == 6


SIZES = {"embed_dim": 96, "eva_depth": 3, "eva_numheads": 2}


@pytest.mark.parametrize(
    ("module", "name", "trainer"),
    [("evaMAE_module", "EvaMAE", "BaseEvaMAETrainer"), ("evaSimMIM_module", "EvaSimMIM", "SimMIMEvaTrainer")],
)
def test_primus_of_nnssl_computes_the_same_features(module, name, trainer, nnssl_source, tmp_path, monkeypatch):
    monkeypatch.setitem(primus.SIZES, "PrimusS", SIZES)
    torch.manual_seed(0)
    decoder = {"decoder_eva_depth": 0} if name == "EvaMAE" else {}  # as nnssl does for VoCo: the encoder alone
    source = getattr(nnssl_source(module), name)(
        input_channels=1, embed_dim=96, patch_embed_size=(8, 8, 8), output_channels=1, encoder_eva_depth=3,
        encoder_eva_numheads=2, input_shape=(32, 32, 32), init_values=0.1, scale_attn_inner=True, **decoder,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(source.eva.pos_embed)
    plan = layouts.adaptation_plan("PrimusS", None, keys=("eva", "down_projection"))
    weights = read_weights(saved(tmp_path, layouts.nnssl(source.state_dict(), plan, trainer)))
    network, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.unused) == (1.0, (), ())
    x = image((32, 32, 32))
    seen = []
    source.up_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        source(x) if name == "EvaMAE" else source(x, torch.ones(1, 1, 4, 4, 4))
        ours = network.encoder(x)[0]
    theirs = seen[0]
    print(f"{name}: largest difference {(ours - theirs).abs().max():.2g}")
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.fixture(scope="module")
def pumit_code():
    with official_pumit.official(checkout("AUTOSEG_OFFICIAL_PUMIT")) as code:
        yield code


def rounded(network):
    """Random weights that single precision, which files are read in, holds exactly."""
    layouts.randomised(network)
    for parameter in network.parameters():
        parameter.data.copy_(parameter.data.float())
    return network


def largest(pairs) -> float:
    """Absolute difference over pairs of tensors; theirs may be a subclass that carries the spacing."""
    return max(float((theirs.as_subclass(torch.Tensor) - ours).abs().max()) for theirs, ours in pairs)


def volume(degree: int) -> torch.Tensor:
    """Two samples of two slabs of 2 × 3 tokens, more than the table of positions has at DA 4, one plane at DA 5."""
    slabs = {4: 6, 5: 1}.get(degree, 2)
    return layouts.noise(f"volume {degree}", (2, 3, slabs * max(16 >> degree, 1), 32, 48))


@torch.no_grad()
def test_the_official_pumit_tokenizer_computes_the_same(pumit_code, tmp_path):
    theirs = rounded(official_pumit.tokenizer(pumit_code, pumit.CHANNELS, pumit.CODES))
    state = {name: tensor.float() for name, tensor in theirs.state_dict().items()}
    shapes = layouts.pumit_tokenizer_shapes(pumit.CHANNELS, pumit.CODES)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    found = read_tokenizer(saved(tmp_path, {**layouts.pumit_tokenizer(), "model": state}))
    ours = Tokenizer(**found.options).double().eval()
    ours.load_state_dict(found.tensors)
    for degree in range(6):
        x = volume(degree)
        z = theirs.encode(pumit_code.sac.SpatialTensor(x.clone(), degree))
        chosen = theirs.quantize(z)
        features, below = ours.encoder(x, Spacing(degree))
        logits, _ = ours.encode(x, Spacing(degree))
        codes = ours.quantize(soft(logits))
        image, _ = ours.decode(codes, below)
        pairs = {
            "z": (z, features),
            "logits": (chosen.logits, logits),
            "z_q": (chosen.z_q, codes),
            "reconstruction": (theirs.decode(chosen.z_q), image),
        }
        differences = {name: largest([pair]) for name, pair in pairs.items()}
        print(f"DA {degree}: {', '.join(f'{name} {value:.2g}' for name, value in differences.items())}")
        assert max(differences.values()) <= 1e-10
        assert image.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("mask_block", [0, 2])
def test_the_official_pumit_transformer_computes_the_same(mask_block, pumit_code, tmp_path):
    tokens = official_pumit.tokenizer(pumit_code, pumit.CHANNELS, pumit.CODES)
    theirs = rounded(official_pumit.transformer(pumit_code, tokens, (128, 3, 2), range(mask_block, 3)))
    state = {name: tensor.float() for name, tensor in theirs.state_dict().items()}
    shapes = layouts.pumit_transformer_shapes(128, 3, pumit.CODES)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    network, report = loaded(read_weights(saved(tmp_path, {**layouts.pumit_transformer(), "state_dict": state})))
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    ours = network.encoder.vit.double()
    for degree in range(6):
        x = volume(degree)
        spatial = [pumit_code.sac.SpatialTensor(x.clone(), degree) for _ in range(3)]
        length = 6 * x.shape[2] // max(16 >> degree, 1)
        generator = torch.Generator().manual_seed(degree)
        visible = torch.stack([torch.randperm(length, generator=generator)[: length // 2].sort()[0] for _ in x])
        masked = ours(x, degree, visible, mask_token=theirs.mask_token, mask_block=mask_block)
        differences = {
            "blocks": largest(zip(theirs.forward_features(spatial[0]), ours(x, degree, None, range(3)), strict=True)),
            "all visible": largest([(theirs(spatial[1]), ours(x, degree))]),
            "half visible": largest([(theirs(spatial[2], visible), masked)]),
        }
        print(f"DA {degree}: {', '.join(f'{name} {value:.2g}' for name, value in differences.items())}")
        assert max(differences.values()) <= 1e-10
        assert masked.std() > 0.1


@torch.no_grad()
def test_the_official_pumit_has_our_known_numbers(pumit_code):
    tokenizer = official_pumit.tokenizer(pumit_code, pumit.CHANNELS, pumit.CODES)
    tokenizer.load_state_dict(pumit.tokenizer().state_dict())
    ours, mask = pumit.transformer()
    sizes = (pumit.WIDTH, pumit.DEPTH, pumit.HEADS)
    whole, late = (official_pumit.transformer(pumit_code, tokenizer, sizes, blocks) for blocks in (range(3), [2]))
    for network in (whole, late):
        for name, tensor in network.state_dict().items():
            if not name.startswith(("mask_token", "mim_head.")):
                tensor.copy_(ours.state_dict()[next(iter(timm_names({name: tensor})))])
        network.mask_token.copy_(mask)
    for degree in pumit.DEGREES:
        x = [pumit_code.sac.SpatialTensor(pumit.picture(degree), degree) for _ in range(5)]
        z = tokenizer.encode(x[0])
        chosen = tokenizer.quantize(z)
        values = (z, chosen.logits, chosen.z_q, tokenizer.decode(chosen.z_q))
        hidden = (
            whole.forward_features(x[1])[1], whole(x[2]), whole(x[3], pumit.VISIBLE), late(x[4], pumit.VISIBLE),
        )  # fmt: skip
        for found, known in ((values, pumit.TOKENIZER[degree]), (hidden, pumit.TRANSFORMER[degree])):
            for tensor, numbers in zip(found, known, strict=True):
                assert pumit.digest(tensor.as_subclass(torch.Tensor)) == pytest.approx(numbers, rel=1e-8, abs=1e-8)


def test_the_official_pumit_takes_one_channel_by_the_same_rule(pumit_code, tmp_path):
    content = layouts.pumit_transformer()
    kwargs = {"pos_embed_shape": (5, 10, 10), "pretrained_ckpt": pumit_code.vit.Checkpoint()}
    theirs = pumit_code.vit.ViT(in_channels=1, embed_dim=128, depth=3, num_heads=2, **kwargs)
    theirs.load_state_dict(dict(content["state_dict"]), strict=False)
    network, report = loaded(read_weights(saved(tmp_path, content)), channels=1)
    assert [name for name, _ in report.adapted] == ["vit.patch_embed.proj.weight"]
    ours = network.encoder.vit.patch_embed["proj"].weight
    assert torch.allclose(theirs.patch_embed.proj.weight, ours, atol=1e-6)


@pytest.fixture
def dinov3_source(monkeypatch):
    """Their transformer imports nothing that is not installed here."""
    monkeypatch.syspath_prepend(str(checkout("AUTOSEG_OFFICIAL_DINOV3")))
    before = set(sys.modules)
    yield lambda name: importlib.import_module(f"dinov3.{name}")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "dinov3":
            del sys.modules[name]


def official_dinov3(source, which):
    """ViT-B/16 as the authors build it, with random weights whose tokens are small, so that ε is seen; float32."""
    if which.startswith("Meta"):
        theirs = source("hub.backbones").dinov3_vitb16(pretrained=False)
    else:  # ricklisz/MedDINOv3:inference/demo.ipynb
        theirs = source("models.vision_transformer").vit_base(
            drop_path_rate=0.2, layerscale_init=1e-5, n_storage_tokens=4, qkv_bias=False, mask_k_bias=True
        )
    theirs.init_weights()
    layouts.randomised(theirs).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "token" in name or "patch_embed" in name:
                parameter *= 0.02
            elif name.endswith("qkv.bias") and which == "Meta":
                parameter.zero_()
    return theirs


def dinov3_file(theirs, which, tmp_path):
    state = dict(theirs.state_dict())
    assert {n: tuple(t.shape) for n, t in state.items()} == layouts.dinov3_shapes(768, 12, bias=which != "MedDINOv3")
    return saved(tmp_path, layouts.meddinov3(state) if which == "MedDINOv3" else state)


def with_periods(theirs, stored: torch.dtype, angles: torch.dtype):
    """Periods made in `stored`, positions and angles in `angles`."""
    rope = theirs.rope_embed
    rope.dtype = stored
    rope._init_weights()
    rope.dtype, rope.periods = angles, rope.periods.to(angles)
    return theirs


def maps(theirs, x):
    return theirs.get_intermediate_layers(x, n=[2, 5, 8, 11], reshape=True, norm=True)


SIZES_OF_IMAGES = [(64, 64), (96, 160), (224, 224)]


@torch.no_grad()
@pytest.mark.parametrize("which", ["Meta", "Meta, with biases", "MedDINOv3"])
def test_the_official_dinov3_computes_the_same(which, dinov3_source, tmp_path):
    """The four maps in double precision, but for sine and cosine of the positions, which each makes in single precision."""
    theirs = official_dinov3(dinov3_source, which)
    weights = read_weights(dinov3_file(theirs, which, tmp_path))
    arguments = weights.architecture["arch_kwargs"]
    assert (arguments["qkv_bias"], arguments["eps"]) == (which == "Meta, with biases", theirs.norm.eps)
    network, report = loaded(weights)
    assert (report.encoder_share, report.adapted, report.new, report.unused) == (1.0, (), (), ())
    other = copy.deepcopy(weights)
    other.architecture["arch_kwargs"]["eps"] = 1.1e-5 - arguments["eps"]
    ours, changed = network.encoder.double(), loaded(other)[0].encoder.double()
    with_periods(theirs, torch.float32, torch.float32).double()
    for rope in (ours.rope, changed.rope, theirs.rope_embed):
        rope.float()
    # Else their attention would round queries and keys too.
    theirs.rope_embed.register_forward_hook(lambda _, __, angles: tuple(tensor.double() for tensor in angles))
    for size in SIZES_OF_IMAGES:
        x = layouts.noise(f"slice {size}", (2, 3, *size))
        found = ours(x)
        differences = [largest([pair]) for pair in zip(maps(theirs, x), found, strict=True)]
        wrong = largest(zip(found, changed(x), strict=True))
        print(f"{which} {size}: {', '.join(f'{d:.2g}' for d in differences)}; with the other ε {wrong:.2g}")
        assert max(differences) <= 1e-10
        assert wrong > 1e-3
        assert min(float(tensor.std()) for tensor in found) > 0.5


@torch.no_grad()
@pytest.mark.parametrize(("which", "angles"), [("Meta", torch.float32), ("MedDINOv3", torch.bfloat16)])
def test_rounded_positions_of_the_official_dinov3_are_close(which, angles, dinov3_source, tmp_path):
    """Meta's files hold periods in bfloat16 and its code makes angles in float32; training runs do both in bfloat16."""
    theirs = official_dinov3(dinov3_source, which)
    network, _ = loaded(read_weights(dinov3_file(theirs, which, tmp_path)))
    with_periods(theirs, torch.bfloat16, angles)
    for size in SIZES_OF_IMAGES:
        x = layouts.noise(f"slice {size}", (2, 3, *size)).float()
        pairs = list(zip(maps(theirs, x), network.encoder(x), strict=True))
        cosines = [float(torch.cosine_similarity(a, b, dim=1).min()) for a, b in pairs]
        print(f"{which} {angles} {size}: 1 - cosine {1 - min(cosines):.2g}, largest difference {largest(pairs):.2g}")
        assert min(cosines) > 0.995


def test_the_heads_of_the_official_dinov3_have_the_names_of_ours(dinov3_source):
    head = dinov3_source("layers.dino_head").DINOHead(128, 32, nlayers=3, hidden_dim=24, bottleneck_dim=8)
    theirs = {f"{kind}.{n}": t.shape for kind in ("dino_head", "ibot_head") for n, t in head.state_dict().items()}
    assert {name: tensor.shape for name, tensor in layouts.dino_heads().items()} == theirs
