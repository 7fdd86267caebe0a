"""The same comparisons with the authors' own classes, for whoever has their source: `pytest -m official`.

AUTOSEG_OFFICIAL_VOCO: a checkout of Luffy03/Large-Scale-Medical. AUTOSEG_OFFICIAL_NNSSL: one of MIC-DKFZ/nnssl.
"""

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
from pretrain.importers.reading import read_weights
from tests import layouts
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
