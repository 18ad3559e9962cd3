"""The networks and the data sets, a line each. Does not import torch: each is given as a path, loaded at first use.

A new network is its file, an entry in NETWORKS, and configs/model/NAME.yaml; a new data set too.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from mbn.system.setting_fields import BELOW_1, among, setting

GAMMAS = ("ones", "uniform")


@dataclass
class Model:
    name: str = setting(MISSING, "the network")
    gamma: str = setting("ones", "the norm layers' gamma at first; uniform: U(0, 1), as in old torch", among(*GAMMAS))


@dataclass
class Dropout(Model):
    dropout: float = setting(0.0, "the share of features dropped in training", BELOW_1)


@dataclass(frozen=True)
class Network:
    """A network. small, large: its builders in `models` for images of up to 64 pixels a side, and for larger ones.

    None: it has no such builder. residual: whether it has shortcuts. sides: the images that small can take.
    """

    small: str | None = None
    large: str | None = None
    settings: type[Model] = Model
    residual: bool = False
    sides: range = range(1, 65)

    def builder(self, image_size: int) -> str | None:
        if image_size > 64:
            return self.large
        return self.small if image_size in self.sides else None


NETWORKS: dict[str, Network] = {
    "resnet20": Network(small="resnet_cifar.resnet20", residual=True),
    "resnet56": Network(small="resnet_cifar.resnet56", residual=True),
    "vgg16": Network(small="vgg.VGG16CIFAR", large="vgg.VGG16ImageNet", sides=range(32, 64)),
    "nin": Network(small="nin.NIN", settings=Dropout, sides=range(32, 64)),
    "resnet18": Network(large="resnet_imagenet.resnet18", residual=True),
    "resnet34": Network(large="resnet_imagenet.resnet34", residual=True),
    "resnet50": Network(large="resnet_imagenet.resnet50", residual=True),
}


def networks(image_size: int) -> list[str]:
    """The networks for images of that many pixels a side."""
    return [name for name, network in NETWORKS.items() if network.builder(image_size)]


@dataclass(frozen=True)
class Source:
    """Where a data set's images come from.

    path: names f(folder), which gives all images as `Arrays`, to be kept on the device. If streamed is true, it names a
    class such as `mbn.data.image_folder.ImageFolders`, whose processes read each image from its file.

    in_tables: whether tables have it. Its records are then evidence, in results/records; git ignores those of others.
    """

    path: str
    streamed: bool = False
    in_tables: bool = False


DATASETS: dict[str, Source] = {
    "cifar10": Source("mbn.data.datasets:cifar10", in_tables=True),
    "cifar100": Source("mbn.data.datasets:cifar100", in_tables=True),
    "digits": Source("mbn.data.datasets:digits"),
    "imagenet": Source("mbn.data.image_folder:ImageFolders", streamed=True, in_tables=True),
}
