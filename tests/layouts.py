"""Files with the layout of each published checkpoint: exact names and shapes, random values, small where the layout allows.

Sources of the names: Luffy03/Large-Scale-Medical (voco_head.py), MONAI (`SwinUNETR.load_from`), MrGiovanni/SuPreM,
MIC-DKFZ/nnssl (AbstractTrainer.save_checkpoint, adaptation_plan.py), MIC-DKFZ/nnUNet (nnUNetTrainer.save_checkpoint),
function2-llx/PUMIT (pumit/model/{vit,mim}.py, pumit/tokenizer/{simple,quantize}.py, scripts/tokenizer/main.py),
facebookresearch/dinov3 (dinov3/models/vision_transformer.py, dinov3/layers/{attention,dino_head}.py, dinov3/train/train.py).
"""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from pretrain.networks.registry import build_network
from tests.tiny import dataset_json, tiny_plan

State = dict[str, Tensor]


def swin(
    feature_size: int = 12, *, use_v2: bool = True, channels: int = 1, outputs: int = 21, seed: int = 0
) -> SwinUNETR:
    """MONAI's own class, as the authors instantiate it."""
    torch.manual_seed(seed)
    return SwinUNETR(in_channels=channels, out_channels=outputs, feature_size=feature_size, use_v2=use_v2).eval()


def voco_encoder(network: SwinUNETR) -> State:
    """VoCo_10k.pt, VoCo_{B,L,H}_SSL_head.pt: bare."""
    return {name: t for name, t in network.state_dict().items() if not name.startswith(("decoder", "out."))}


def projector(width: int, hidden: int, seed: int = 9) -> State:
    """Six tensors of a VoCo projection head; its norms have none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"layer1.0": (hidden, width), "layer2.0": (hidden, hidden), "layer3.0": (hidden, hidden)}
    state = {f"{name}.weight": torch.randn(size, generator=generator) for name, size in sizes.items()}
    return state | {f"{name}.bias": torch.randn(size[0], generator=generator) for name, size in sizes.items()}


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def voco_v2_dump(network: SwinUNETR) -> dict[str, Any]:
    """The authors' training file, under DistributedDataParallel: one encoder, two projectors."""
    state = prefixed("backbone.", voco_encoder(network))
    state |= prefixed("student.", projector(288, 16, 1)) | prefixed("teacher.", projector(288, 16, 2))
    return {"global_step": 7, "state_dict": prefixed("module.", state)}


def voco_v1_dump(student: SwinUNETR, teacher: SwinUNETR) -> dict[str, Any]:
    """The first version's: two whole networks with their projectors."""
    head = prefixed("proj_head.", projector(288, 16))
    state = prefixed("student.", voco_encoder(student) | head) | prefixed("teacher.", voco_encoder(teacher) | head)
    return {"global_step": 7, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def monai_ssl(network: SwinUNETR) -> dict[str, Any]:
    """model_swinvit.pt: the transformer alone, with the heads of its pretraining and the old names of the MLP."""
    state = {
        "module." + name.removeprefix("swinViT.").replace(".mlp.linear", ".mlp.fc"): tensor
        for name, tensor in network.state_dict().items()
        if name.startswith("swinViT.")
    }
    state |= {"module.rotation_head.weight": torch.randn(4, 8), "module.contrastive_head.weight": torch.randn(16, 8)}
    return {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def suprem(network: SwinUNETR) -> dict[str, Any]:
    """supervised_suprem_swinunetr_2100.pth: a whole network with organ embeddings."""
    state = prefixed("module.backbone.", network.state_dict())
    state |= {"module.organ_embedding": torch.randn(32, 8), "module.precls_conv.0.weight": torch.randn(8)}
    return {"net": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 2}


def vocomni_unet(seed: int = 0) -> PlainConvUNet:
    """The network of VoComni_nnunet.pt, with the strides of the published plan."""
    torch.manual_seed(seed)
    return PlainConvUNet(
        1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, [[3, 3, 3]] * 6,
        [[1, 1, 1], *[[2, 2, 2]] * 4, [1, 2, 2]], [2] * 6, 21, [2] * 5, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    ).eval()  # fmt: skip


SMALL_RESENC: dict[str, Any] = {
    "n_stages": 4,
    "features_per_stage": [4, 6, 8, 10],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 4,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 3],
    "n_blocks_per_stage": [1, 2, 2, 1],
    "n_conv_per_stage_decoder": [1] * 3,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.modules.activation.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def resenc(arguments: dict[str, Any] = SMALL_RESENC, channels: int = 1, seed: int = 0) -> ResidualEncoderUNet:
    torch.manual_seed(seed)
    layers = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    network = ResidualEncoderUNet(channels, num_classes=1, deep_supervision=False, **{**arguments, **layers})
    return network.eval()


def adaptation_plan(network: str, arguments: dict | None, *, keys: tuple[str, str], patch: int = 32) -> dict[str, Any]:
    """nnssl's description of a checkpoint, as `AdaptationPlan.serialize` writes it."""
    configuration = {
        "data_identifier": "nnsslPlans_onemmiso", "preprocessor_name": "DefaultPreprocessor", "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False], "spacing": [1, 1, 1],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": {"is_seg": False},
        "resampling_fn_mask": "resample_data_or_seg_to_shape", "resampling_fn_mask_kwargs": {"is_seg": False},
        "patch_size": [patch] * 3,
    }  # fmt: skip
    return {
        "architecture_plans": {
            "arch_class_name": network,
            "arch_kwargs": copy.deepcopy(arguments),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"] if arguments else None,
        },
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind", "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": [1, 1, 1], "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
            "configurations": {"onemmiso": configuration}, "experiment_planner_used": "FixedResEncUNetPlanner",
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": keys[0],
        "key_to_stem": keys[1],
        "keys_to_in_proj": [f"{keys[1]}.convs.0.conv", f"{keys[1]}.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }  # fmt: skip


SECRET = "/cluster/home/somebody/subject_0042"


def nnssl(state: State, plan: dict[str, Any] | None, trainer: str) -> dict[str, Any]:
    """A checkpoint of nnssl, with the paths and subjects that it stores."""
    content = {
        "network_weights": state,
        "trainer_name": trainer,
        "init_args": {"configuration_name": "onemmiso", "fold": "all", "pretrain_json": {"subject": SECRET}},
        "citations": [
            {"type": "Architecture", "name": "ResEncL", "apa_citations": ["Isensee et al. (2024). Revisited."]}
        ],
    }
    return content if plan is None else {**content, "nnssl_adaptation_plan": plan}


def nnunet(seed: int = 0, *, channels: int = 1) -> tuple[dict[str, Any], nn.Module]:
    """A stock checkpoint of nnU-Net, numpy numbers included, and its network."""
    torch.manual_seed(seed)
    plan, labels = tiny_plan(channels=channels), dataset_json(channels)
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    network = build_network(architecture, channels, 3, deep_supervision=True).eval()
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {},
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "epochs": np.int64(3)},
        "_best_ema": np.float64(0.5),
        "current_epoch": 3,
        "init_args": {"plans": plan, "configuration": "3d_fullres", "fold": 0, "dataset_json": labels},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    return content, network


def old_style(plan: dict[str, Any]) -> dict[str, Any]:
    """`plan` as nnU-Net wrote it before it had an `architecture` entry; TotalSegmentator's first models are so."""
    plan = copy.deepcopy(plan)
    configuration = plan["configurations"]["3d_fullres"]
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": arguments["features_per_stage"][0],
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arguments["n_blocks_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1, 2, 2],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    return plan


class PCRLConvolution(nn.Module):
    """The authors' LUConv."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(given, made, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(made)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu()


class PCRLNetwork(nn.Module):
    """The 3D networks of PCRL (version 1) and PCRLv2 (version 2) with their heads, names and order as in their files."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.version = version
        widths = [64, 128, 256, 512]
        for width, given in zip(widths, (1, *widths), strict=False):
            self.add_module(f"down_tr{width}", self._block(given, max(width // 2, 32), width))
        if version == 1:
            self.fc1, self.fc2 = nn.Linear(512, 128), nn.Linear(128, 128)
        for width in reversed(widths[:-1]):
            up = self._block(2 * width + (width if version == 1 else 0), width, width)
            up.up_conv = nn.ConvTranspose3d(2 * width, 2 * width, 2, 2)
            up.ops = up._modules.pop("ops")  # behind up_conv
            if version == 2:
                up.bn = nn.BatchNorm1d(width)
                up.predictor_head = nn.Sequential(
                    nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
                )
                up.deep_supervision_head = PCRLConvolution(width, 1)
            self.add_module(f"up_tr{width}", up)
        self.out_tr = nn.Module()
        self.out_tr.final_conv = nn.Conv3d(64, 1, 1)
        if version == 1:
            self.aug_fc1, self.aug_fc2 = nn.Linear(7, 256), nn.Linear(256, 512)
        self.eval()

    @staticmethod
    def _block(given: int, between: int, made: int) -> nn.Module:
        block = nn.Module()
        block.ops = nn.Sequential(PCRLConvolution(given, between), PCRLConvolution(between, made))
        return block

    def maps(self, x: Tensor) -> list[Tensor]:
        """The encoder's four maps, finest first."""
        found = [self.down_tr64.ops(x)]
        for name in ("down_tr128", "down_tr256", "down_tr512"):
            found.append(getattr(self, name).ops(nn.functional.max_pool3d(found[-1], 2)))
        return found

    def embedding(self, x: Tensor) -> Tensor:
        """Version 1: what contrast compares, before it is normalised."""
        return self.fc2(self.fc1(self.maps(x)[-1].mean((2, 3, 4))).relu())

    def pyramid(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Version 2: the output, and (z, p, middle image) of each scale."""
        below, scales = self.maps(x)[-1], []
        for name in ("up_tr256", "up_tr128", "up_tr64"):
            up = getattr(self, name)
            below = up.ops(up.up_conv(below))
            z = up.bn(below.flatten(2).mean(2))
            head = up.deep_supervision_head
            scales.append((z, up.predictor_head(z), head.bn1(head.conv1(below)).sigmoid()))
        return self.out_tr.final_conv(below).sigmoid(), scales


def filled_by_rule(network: nn.Module) -> nn.Module:
    """Entry j (integers are counted and skipped): mean 0, variance 1, norm weights 1, else sin(0.7 i + j) / √(numel / shape[0])
    rounded to single precision; the network in double precision."""
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_mean"):
            tensor.zero_()
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.fill_(1)
        else:
            i = torch.arange(tensor.numel(), dtype=torch.float64)
            tensor.copy_(((0.7 * i + number).sin() / (tensor.numel() / tensor.shape[0]) ** 0.5).view_as(tensor))
    return network.double()


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers in float64 that follow from `name`, the same with every version of numpy and torch."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))


def randomised(network: nn.Module) -> nn.Module:
    """Every parameter, in place, by its name: weights of norms about 1, kernels such that features stay near 1."""
    for name, parameter in network.named_parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 and "token" not in name and "pos_embed" not in name else 25
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data.copy_(noise(name, tuple(parameter.shape)) / fan**0.5 + is_norm)
    return network


def pumit_transformer_shapes(width: int, depth: int, codes: int, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """Names and shapes in `pumit-b.ckpt` (768, 12, 1024 codes)."""
    hidden = int(width * 8 / 3)
    block = {
        **{f"norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")},
        **{f"attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")},
        **{f"attn.{name}.weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "proj")},
        **{f"mlp.{name}.weight": (hidden, width) for name in ("w1", "w2")},
        **{f"mlp.{name}": (hidden,) for name in ("w1.bias", "w2.bias", "ffn_ln.weight", "ffn_ln.bias")},
        "mlp.w3.weight": (width, hidden),
        "mlp.w3.bias": (width,),
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, width, 5, 10, 10),
        "mask_token": (1, 1, width),
        "patch_embed.proj.weight": (width, channels, 16, 16, 16),
        "patch_embed.proj.bias": (width,),
        **{f"blocks.{number}.{name}": shape for number in range(depth) for name, shape in block.items()},
        "norm.weight": (width,),
        "norm.bias": (width,),
        "mim_head.0.weight": (width, width),
        "mim_head.0.bias": (width,),
        "mim_head.2.weight": (codes, width),
        "mim_head.2.bias": (codes,),
    }


def pumit_tokenizer_shapes(channels: tuple[int, int, int], codes: int, inputs: int = 3) -> dict[str, tuple[int, ...]]:
    """Names and shapes in `simple-soft.ckpt` ((128, 256, 512), 1024 codes): `model`."""
    fine, middle, deep = channels
    three = (3, 3, 3)
    kernels = {
        "encoder.0": (fine, inputs, 4, 4, 4),
        "encoder.3": (middle, fine, 2, 2, 2),
        "encoder.6": (deep, middle, 2, 2, 2),
        **dict.fromkeys(("encoder.9", "encoder.12", "decoder.0", "decoder.3"), (deep, deep, *three)),
        "decoder.6.conv.0": (middle, middle, *three),
        "decoder.7.conv.0": (fine, fine, *three),
        "quantize.proj": (codes, deep),
    }
    ups = {
        "decoder.6.transposed_conv": (deep, middle, 2, 2, 2),
        "decoder.7.transposed_conv": (middle, fine, 2, 2, 2),
        "decoder.8": (fine, inputs, 4, 4, 4),
    }
    norms = {"encoder.1.1": fine, "encoder.4.1": middle, "decoder.6.conv.1": middle, "decoder.7.conv.1": fine}
    norms |= dict.fromkeys(("encoder.7.1", "encoder.10", "encoder.13", "decoder.1", "decoder.4"), deep)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in (kernels | ups).items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in kernels.items()}
    shapes |= {f"{name}.bias": shape[1:2] for name, shape in ups.items()}
    shapes |= {f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")}
    return shapes | {"quantize.embedding.weight": (codes, deep)}


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pumit_transformer(width: int = 128, depth: int = 3, **options: int) -> dict[str, Any]:
    """pumit-b.ckpt: what Lightning writes, without the tokenizer."""
    state = random_state(pumit_transformer_shapes(width, depth, options.pop("codes", 10), **options))
    return {
        "epoch": 0,
        "global_step": 7,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": []}
        ],
        "lr_schedulers": [{"base_values": [2e-5], "metric": None}],
    }


def pumit_tokenizer(channels: tuple[int, int, int] = (8, 16, 24), codes: int = 10, inputs: int = 3) -> dict[str, Any]:
    """simple-soft.ckpt: what Fabric writes."""
    return {
        "model": random_state(pumit_tokenizer_shapes(channels, codes, inputs)),
        "discriminator": {"main.0.weight": torch.zeros(4, 3, 3, 3, 3)},
        "optimizer_g": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "optimizer_d": {"state": {}, "param_groups": []},
        "step": 7,
    }


def dinov3_shapes(
    width: int, depth: int, *, channels: int = 3, storage: int = 4, bias: bool = True
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official transformer; with `bias`, Meta's ViT-B/16 (768, 12), without, MedDINOv3's."""
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    vectors = [*(f"norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")), "ls1.gamma", "ls2.gamma"]
    block: dict[str, tuple[int, ...]] = dict.fromkeys(vectors, (width,))
    for name, shape in linear.items():
        block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if bias:
        block["attn.qkv.bias_mask"] = (3 * width,)
    else:
        del block["attn.qkv.bias"]
    return {
        "cls_token": (1, 1, width),
        **({"storage_tokens": (1, storage, width)} if storage else {}),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, channels, 16, 16),
        "patch_embed.proj.bias": (width,),
        "rope_embed.periods": (16,),
        **{f"blocks.{number}.{name}": shape for number in range(depth) for name, shape in block.items()},
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def dinov3(width: int = 128, depth: int = 4, *, biased: bool = False, **options: Any) -> State:
    """dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth: flat, with biases that are zero unless `biased`."""
    state = random_state(dinov3_shapes(width, depth, **options))
    state["rope_embed.periods"] = (100 ** (torch.arange(16) / 16)).bfloat16()
    for name in [name for name in state if name.endswith("bias_mask")]:
        mask, bias = torch.ones(3, width), name.removesuffix("_mask")
        mask[1] = 0
        state[name] = mask.flatten()
        state[bias] = state[bias] * mask.flatten() if biased else torch.zeros(3 * width)
    return state


def dino_heads(width: int = 128) -> State:
    """The two heads of a training run, with few prototypes."""
    shapes = {"mlp.0": (24, width), "mlp.2": (24, 24), "mlp.4": (8, 24)}
    head = {f"{name}.weight": shape for name, shape in shapes.items()}
    head |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()} | {"last_layer.weight": (32, 8)}
    return {f"{kind}.{name}": t for kind in ("dino_head", "ibot_head") for name, t in random_state(head).items()}


def dinov3_run(state: State | None = None) -> State:
    """A network of a training run with its heads; those of MedDINOv3 have no bias of queries, keys and values."""
    state = dinov3(bias=False) if state is None else state
    return prefixed("backbone.", state) | dino_heads(len(state["norm.weight"]))


def meddinov3(state: State | None = None) -> dict[str, State]:
    """MedDINOv3's model.pth, and teacher_checkpoint.pth of any run: the teacher alone."""
    return {"teacher": dinov3_run(state)}


def dinov3_dump(student: State, teacher: State) -> dict[str, Any]:
    """What `dcp_to_torch_save` makes of a run's whole checkpoint."""
    networks = {"student": student, "teacher": teacher, "model_ema": teacher, "gram_teacher": dinov3_run()}
    model = {f"{kind}.{name}": t for kind, state in networks.items() for name, t in state.items()}
    model["dino_loss.center"] = torch.zeros(1, 32)
    return {"iteration": 7, "model": model, "optimizer": {"state": {}, "param_groups": []}}
