"""The shape of an encoder, as a value: a vision transformer (ViT) in timm's terms. Needs no torch.

Names and semantics are those of timm's `VisionTransformer`, so that an exported encoder loads there strictly and a published pathology
encoder can be described here. Legend of shapes: D embedding width, H hidden width of the MLP, P patch side in pixels, T tokens.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Final, Literal

Shape = tuple[int, ...]

#: Number type of every parameter, as safetensors and numpy spell it. Trained parameters are float32 masters: bfloat16 is for computing with
#: (autocast), never for what is kept, noised and sent to and fro.
PARAMETER_DTYPE: Final = "float32"

#: Mean and standard deviation of red, green and blue (ImageNet's, as published encoders use them), in units of the full scale 255.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A vision transformer.

    Attributes:
        name: ours; where `timm_name` is empty, also timm's architecture, which then has these very arguments.
        timm_name: timm's architecture to build it from where timm has none with these arguments; it has to agree in `mlp`.
        img_size: side of the square input, pixels; a multiple of `patch_size`.
        patch_size: side of a patch, pixels.
        embed_dim: width D of a token; a multiple of `num_heads` and of 4.
        depth: number of blocks.
        num_heads: attention heads a block.
        mlp_ratio: hidden width is ``int(embed_dim * mlp_ratio)``; with "swiglu" that counts gate and value together, as timm does.
        mlp: "gelu", or "swiglu" (timm: mlp_layer=SwiGLUPacked, act_layer=SiLU).
        reg_tokens: register tokens.
        init_values: first value of LayerScale, or None for no LayerScale.
        class_token: whether there is a class token.
        no_embed_class: the position embedding covers the patches alone, not class and register tokens.
        qkv_bias: whether query, key and value have biases.
    """

    name: str
    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    reg_tokens: int = 0
    init_values: float | None = None
    class_token: bool = True
    no_embed_class: bool = False
    qkv_bias: bool = True
    timm_name: str = ""

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size, got {self.img_size} and {self.patch_size}")
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of num_heads and of 4, got {self.embed_dim} and {self.num_heads} heads")
        if self.mlp not in ("gelu", "swiglu"):
            raise ValueError(f"mlp must be 'gelu' or 'swiglu', got {self.mlp!r}")
        if self.hidden_dim < 1 or (self.mlp == "swiglu" and self.hidden_dim % 2):
            raise ValueError(f"mlp_ratio must give a positive hidden width, even for swiglu, got {self.hidden_dim}")
        if self.reg_tokens < 0:
            raise ValueError(f"reg_tokens must be at least 0, got {self.reg_tokens}")
        if self.init_values is not None and not self.init_values > 0:
            raise ValueError(f"init_values must be above 0 or None, got {self.init_values}")

    @property
    def grid(self) -> int:
        """Patches along one side of the input."""
        return self.img_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return self.grid**2

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens, which come before the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP's first layer."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(prod(shape) for shape in self.shapes().values())

    @property
    def architecture(self) -> str:
        """timm's architecture that `timm_args` belong to."""
        return self.timm_name or self.name

    def timm_args(self) -> dict[str, object]:
        """Arguments, JSON values all, with which ``timm.create_model(spec.architecture, **spec.timm_args())`` has these shapes."""
        arguments: dict[str, object] = {"img_size": self.img_size, "num_classes": 0}
        if not self.timm_name:
            return arguments
        sizes = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values", "reg_tokens")
        choices = ("class_token", "no_embed_class", "qkv_bias")
        return arguments | {name: getattr(self, name) for name in (*sizes, *choices)}

    def dtypes(self) -> dict[str, str]:
        """Number type of every parameter, under the names and in the order of `shapes`."""
        return dict.fromkeys(self.shapes(), PARAMETER_DTYPE)

    def shapes(self) -> dict[str, Shape]:
        """Shape of every parameter under timm's name, in timm's order."""
        width, embedded = self.embed_dim, self.patches + (0 if self.no_embed_class else self.prefix_tokens)
        shapes: dict[str, Shape] = {}
        if self.class_token:
            shapes["cls_token"] = (1, 1, width)
        if self.reg_tokens:
            shapes["reg_token"] = (1, self.reg_tokens, width)
        shapes["pos_embed"] = (1, embedded, width)
        shapes["patch_embed.proj.weight"] = (width, 3, self.patch_size, self.patch_size)
        shapes["patch_embed.proj.bias"] = (width,)
        for index in range(self.depth):
            shapes |= {f"blocks.{index}.{name}": shape for name, shape in self.block_shapes().items()}
        return shapes | {"norm.weight": (width,), "norm.bias": (width,)}

    def block_shapes(self) -> dict[str, Shape]:
        """Shape of every parameter of one block, named within the block."""
        width, hidden = self.embed_dim, self.hidden_dim
        scale = self.init_values is not None
        shapes: dict[str, Shape] = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width)}
        shapes |= {"attn.qkv.bias": (3 * width,)} if self.qkv_bias else {}
        shapes |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        shapes |= {"ls1.gamma": (width,)} if scale else {}
        shapes |= {"norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,)}
        inner = hidden // 2 if self.mlp == "swiglu" else hidden
        shapes |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
        return shapes | ({"ls2.gamma": (width,)} if scale else {})


#: timm's ViT-g of DINOv2 is its only architecture with SwiGLU built in, so that an export of these needs no class named by hand.
_SWIGLU_14 = EncoderSpec(
    name="vit_giant_patch14_reg4_224",
    timm_name="vit_giant_patch14_reg4_dinov2",
    img_size=224,
    patch_size=14,
    embed_dim=1536,
    depth=40,
    num_heads=24,
    mlp_ratio=5.33334,
    mlp="swiglu",
    reg_tokens=4,
    init_values=1e-5,
    no_embed_class=True,
)

_PRESETS = {
    spec.name: spec
    for spec in (
        EncoderSpec(name="vit_tiny_patch16_224", img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3),
        EncoderSpec(name="vit_small_patch16_224", img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
        EncoderSpec(name="vit_base_patch16_224", img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
        EncoderSpec(name="vit_large_patch16_224", img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16),
        # Virchow2's shape.
        replace(
            _SWIGLU_14, name="vit_huge_patch14_reg4_224", embed_dim=1280, depth=32, num_heads=16, mlp_ratio=5.3375, no_embed_class=False
        ),
        # UNI2-h's.
        replace(_SWIGLU_14, name="vit_giant_patch14_reg8_depth24_224", depth=24, reg_tokens=8),
        # H-optimus-0's.
        _SWIGLU_14,
        # Prov-GigaPath's tile encoder.
        replace(
            _SWIGLU_14,
            name="vit_giant_patch16_224",
            timm_name="vit_giant_patch14_dinov2",
            patch_size=16,
            reg_tokens=0,
            no_embed_class=False,
        ),
        # ViT-G of Zhai et al. (2022), arXiv:2106.04560.
        EncoderSpec(
            name="vit_gigantic_patch14_224", img_size=224, patch_size=14, embed_dim=1664, depth=48, num_heads=16, mlp_ratio=64 / 13
        ),
    )
}


def preset_names() -> tuple[str, ...]:
    """The presets' names, the smaller encoder first."""
    return tuple(_PRESETS)


def preset(name: str, *, img_size: int | None = None) -> EncoderSpec:
    """The encoder of that name, for tiles of `img_size` pixels a side (default: the size in its name).

    Raises:
        ValueError: no such preset, or `img_size` is not a multiple of its patch size.
    """
    if name not in _PRESETS:
        raise ValueError(f"no encoder preset {name!r}; there are {list(_PRESETS)}")
    spec = _PRESETS[name]
    return spec if img_size is None else replace(spec, img_size=img_size)
