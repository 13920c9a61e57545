"""What the first-party plugins register. Targets are strings: listing them imports nothing."""

from scl_defense import hookimpl
from scl_defense.hookspecs import Register

_HERE = "scl_defense_plugins"


@hookimpl
def register_generators(register: Register) -> None:
    at = f"{_HERE}.generators"
    register(
        "contrastive-pgd",
        f"{at}.contrastive_pgd:ContrastivePGD",
        summary="model-free: maximise InfoNCE in a fixed feature space, no trained weight, no label",
    )
    register(
        "contrastive-pgd-online",
        f"{at}.contrastive_pgd_online:ContrastivePGDOnline",
        summary="label-free: maximise InfoNCE of the encoder in training (or its EMA twin)",
    )
    register("pgd", f"{at}.pgd:PGD", summary="PGD on the classifier in training: CE, KL or margin; one step is FGSM-RS")
    register(
        "ridge-pgd",
        f"{at}.ridge_pgd:RidgePGD",
        summary="model-free: PGD on ridge classifiers of random features, solved for and drawn anew at every step",
    )
    register("uniform-noise", f"{at}.uniform_noise:UniformNoise", summary="control: uniform in the ball")
    register("corner-noise", f"{at}.corner_noise:CornerNoise", summary="control: a random extreme point of the ball")
    register("none", f"{at}.none:NoGenerator", summary="no adversarial views: train on clean images alone")


@hookimpl
def register_trainers(register: Register) -> None:
    at = f"{_HERE}.trainers"
    presets = f"{at}.presets"
    register(
        "adv-supcon",
        f"{presets}:AdvSupCon",
        summary="supervised contrastive over clean and adversarial views, CE on clean and adversarial",
    )
    register("simclr", f"{presets}:SimCLR", summary="NT-Xent on clean views, linear probe (label-free)")
    register("supcon", f"{presets}:SupCon", summary="supervised contrastive on clean views, linear probe")
    register("rocl", f"{presets}:RoCL", summary="RoCL: adversarial views as instance positives, linear probe")
    register("acl", f"{presets}:ACL", summary="ACL(DS): clean and adversarial NT-Xent with dual batch norm, probe")
    register("clae", f"{presets}:CLAE", summary="CLAE: NT-Xent with one-step adversarial positives, probe")
    register("ascl", f"{presets}:ASCL", summary="ASCL: CE on adversarials + supervised contrastive + KL")
    register("wang-scl", f"{presets}:WangSCL", summary="SupCon + CE on clean images, from the description")
    register("wang-scl-margin", f"{presets}:WangSCLMargin", summary="SupCon + CE + margin, from the description")
    register("multiview", f"{at}.multiview:MultiView", summary="the general contrastive trainer: every switch")
    register(
        "cross-entropy",
        f"{at}.cross_entropy:CrossEntropy",
        summary="the plain baseline; with generator pgd it is Madry's adversarial training",
    )
    register("trades", f"{at}.trades:TRADES", summary="TRADES: CE on clean + KL to adversarial")
    register("mart", f"{at}.mart:MART", summary="MART: boosted CE on adversarial + KL weighted by doubt")
    register("linear", f"{at}.linear:Linear", summary="a linear head on a frozen encoder (--init CKPT): SLF, ALF")


@hookimpl
def register_models(register: Register) -> None:
    at = f"{_HERE}.models"
    register("small-cnn", f"{at}.small_cnn:SmallCNN", summary="small batch-norm CNN for images of 8 to 64 pixels")
    register("resnet18", f"{at}.resnet18:ResNet18", summary="ResNet-18, 3x3 stem (stem=imagenet: torchvision's form)")
    register("preact-resnet18", f"{at}.preact_resnet18:PreActResNet18", summary="pre-activation ResNet-18")
    register("wide-resnet", f"{at}.wide_resnet:WideResNet", summary="wide ResNet, WRN-28-10 unless told otherwise")


@hookimpl
def register_datasets(register: Register) -> None:
    at = f"{_HERE}.datasets"
    register("digits", f"{at}.digits:Digits", summary="1,797 scanned digits 8x8, inside scikit-learn: no download")
    register("mnist", f"{at}.torchvision_sets:MNIST", summary="MNIST 28x28 grey, 10 classes")
    register("fashion-mnist", f"{at}.torchvision_sets:FashionMNIST", summary="Fashion-MNIST 28x28 grey, 10 classes")
    register("cifar10", f"{at}.torchvision_sets:CIFAR10", summary="CIFAR-10 32x32 colour, 10 classes")
    register("cifar100", f"{at}.torchvision_sets:CIFAR100", summary="CIFAR-100 32x32 colour, 100 classes")
    register("svhn", f"{at}.torchvision_sets:SVHN", summary="Street View House Numbers 32x32 colour, 10 classes")
    register("npz", f"{at}.npz:Npz", summary="your own arrays: images (N,H,W,C) uint8 and labels per split")
    register("npy", f"{at}.npy:Npy", summary="your own arrays as .npy files, read as needed: larger than memory")
    register("image-folder", f"{at}.image_folder:ImageFolder", summary="your own images: one folder a class")


@hookimpl
def register_loggers(register: Register) -> None:
    at = f"{_HERE}.loggers"
    register("jsonl", f"{at}.jsonl:JsonLines", summary="metrics.jsonl in the run's folder, one epoch a line")
    register(
        "tensorboard", f"{at}.tensorboard:TensorBoard", summary="TensorBoard (pip install scl-defense[tensorboard])"
    )
