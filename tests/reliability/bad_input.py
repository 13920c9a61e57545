"""Users' mistakes: what is given, and what the one line of the answer says. ``docs/reliability.md`` shows this table.

In an argument ``{ck}`` is a small checkpoint for digits, ``{colour}``, ``{wide}``, ... are data sets that the test
makes. Every row ends with exit code 2, one line on stderr, and nothing written.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A command line, and words of the answer."""

    mistake: str
    arguments: str
    says: str


def rows(mistake: str, *pairs: tuple[str, str]) -> list[Row]:
    return [Row(mistake, arguments, says) for arguments, says in pairs]


TRAIN = "train --generator none --epochs 1 -m width=2 --data"
TABLE = [
    *rows(
        "an option out of range",
        ("train --epochs 0", "greater than or equal to 1"),
        ("train --seed -1", "greater than or equal to 0"),
        ("train --val-fraction 1", "less than 1"),
        ("train --momentum 1", "less than 1"),
        ("train --strength 1.5", "less than or equal to 1"),
        ("train --limit 1", "greater than or equal to 2"),
        ("train --val-limit 1", "greater than or equal to 2"),
        ("train -g steps=0", "greater than or equal to 1"),
        ("train -m width=0", "greater than or equal to 1"),
        ("train -m width=99999999", "less than or equal to 1024"),
        ("train -t temperature=0", "greater than 0"),
        ("generate --copies 0", "greater than or equal to 1"),
        ("generate --batch-size 1", "greater than or equal to 2"),
        ("finetune {ck} --epochs 0", "greater than or equal to 1"),
        ("benchmark {ck} --n 0", "not in the range x>=1"),
        ("benchmark {ck} --batch-size 0", "not in the range x>=1"),
        ("benchmark {ck} --fail-under 2", "not in the range 0<=x<=1"),
        ("benchmark {ck} --attacks pgd:steps=0", "greater than or equal to 1"),
        ("benchmark {ck} --time-limit 0", "must be a time above 0"),
        ("agreement {ck} --n 0", "not in the range x>=1"),
        ("study {study} --jobs 0", "not in the range x>=1"),
        ("study {study} --seeds 0,0", "must be different integers"),
    ),
    *rows(
        "a wrong type",
        ("train --epochs two", "valid integer, unable to parse string as an integer, not 'two'"),
        ("train --lr fast", "valid number"),
        ("train --lr nan", "should be a finite number"),
        ("train --seed 1e3", "valid integer"),
        ("train -g steps=x", "valid integer"),
        ("train -g steps", "must be written name=value"),
        ("train -g =3", "must be written name=value"),
        ("generate --copies 1.5", "valid integer"),
        ("benchmark {ck} --n many", "not a valid integer"),
        ("benchmark {ck} --attacks pgd:steps=1e9", "valid integer"),
        ("benchmark {ck} --time-limit soon", "must be a time above 0"),
        ("study {study} --seeds a,b", "must be integers joined by commas"),
        ("study {study} --set epochs", "must be written name=value"),
    ),
    *rows(
        "a name that does not exist",
        ("trian", "No such command"),
        ("train --epoch 3", "No such option"),
        ("train --generator contrastve-pgd", "did you mean 'contrastive-pgd'"),
        ("train --trainer advsupcon", "did you mean 'adv-supcon'"),
        ("train --model resnet-18", "did you mean 'resnet18'"),
        ("train --data digit", "did you mean 'digits'"),
        ("train --logger tensorbord", "did you mean 'tensorboard'"),
        ("train -g stepz=3", "did you mean 'steps'"),
        ("train --generator mix:contrastive-pgd=0.5,cornernoise=0.5", "did you mean 'corner-noise'"),
        ("benchmark {ck} --attacks pdg", "did you mean 'pgd'"),
        ("finetune {ck} --protocol sfl", "did you mean 'slf'"),
        ("study {study} --only plian", "did you mean 'plain'"),
        ("plugins list nothing", "no component is named 'nothing'"),
    ),
    *rows(
        "a contradictory pair",
        ("train --resume {ck} --epochs 3", "own recipe"),
        ("train --resume {ck} --config {recipe}", "own recipe"),
        ("train -g steps=3 -g steps=4", "given twice"),
        ("train --data {good} -d path=elsewhere", "is a path already"),
        ("benchmark {ck} --model resnet18", "knows its own network"),
        ("benchmark {ck} --mean 0.5", "knows its own network"),
        ("benchmark {ck} --attacks fgsm,fgsm", "leave one out"),
        ("benchmark {ck} --attacks pgd:steps=3:steps=4", "given twice"),
        ("benchmark {ck} --attacks standard:steps=3", "takes no options"),
        ("generate --generator contrastive-pgd-online", "follows the network in training"),
        ("generate --generator file:x.safetensors", "cannot be read"),
    ),
    *rows(
        "a missing file",
        ("train --config missing.toml", "No such file"),
        ("train --resume missing", "does not exist"),
        ("train --init missing.pt", "No such file"),
        ("train --plugin missing.py", "does not exist"),
        ("train --data missing", "there is no data set named 'missing'"),
        ("train --generator file:missing.safetensors", "No such file"),
        ("benchmark missing.pt", "does not exist"),
        ("benchmark {ck} --surrogate missing.pt --attacks transfer", "missing.pt"),
        ("benchmark {ck} --label-map missing.json", "label map"),
        ("finetune missing.pt", "does not exist"),
        ("agreement missing.pt", "does not exist"),
        ("info missing.pt", "No such file"),
        ("study missing.toml", "No such file"),
    ),
    *rows(
        "a directory instead of a file",
        ("train --config {here}", "Is a directory"),
        ("train --init {here}", "is a directory"),
        ("train --plugin {here}", "does not exist"),
        ("train --generator file:{here}", "are a directory"),
        ("benchmark {here}", "is a directory"),
        ("benchmark {ck} --out {here}", "is a directory"),
        ("generate --out {here}", "must end in .safetensors"),
        ("finetune {here}", "is a directory"),
        ("info {here}", "is a directory"),
        ("study {here}", "Is a directory"),
    ),
    *rows(
        "a file instead of a directory, or a device",
        ("train --out {ck}", "choose another --out"),
        ("train --data {ck}", "is no data set"),
        ("benchmark {ck} --out /dev/full", "no regular file"),
        ("benchmark {ck} --out /dev/null/x.json", "cannot make the folder"),
        ("benchmark /dev/zero", "no regular file"),
        ("info /dev/zero", "no regular file"),
        ("study /dev/zero", "no regular file"),
        ("train --generator file:/dev/zero", "no regular file"),
        ("generate --out /dev/null/x.safetensors", "cannot make the folder"),
    ),
    *rows(
        "a file of another kind",
        ("benchmark {recipe}", "no zip file"),
        ("info {recipe}", "no zip file"),
        ("train --config {ck}", "is not TOML"),
        ("study {recipe}", "has no key"),
        ("train --generator file:{ck}", "holds no stored examples"),
        ("train --resume {ck}", "is finished"),
        ("benchmark {ck} --out {recipe}", "is no benchmark result; it is kept"),
        ("train --plugin {recipe}", "must end in .py"),
    ),
    *rows(
        "empty data", (f"{TRAIN} {{empty}}", "there is no image in it"), ("benchmark {ck} --data {empty}", "no image")
    ),
    *rows("one class", (f"{TRAIN} {{one_class}}", "at least 2 classes are needed")),
    *rows(
        "labels outside the classes",
        (f"{TRAIN} {{outside}}", "labels run from 0 to 3 but there are 2 classes"),
        (f"{TRAIN} {{negative}}", "labels run from -1"),
        (f"{TRAIN} {{huge_labels}}", "number the classes 0, 1, 2"),
        (f"{TRAIN} {{float_labels}}", "labels must be integers"),
        (f"{TRAIN} {{short_labels}}", "40 images but 39 labels"),
    ),
    *rows(
        "images in 0..255 as floats, normalised, or not finite",
        (f"{TRAIN} {{floats}}", "if they are 0..255"),
        (f"{TRAIN} {{normalised}}", "they look normalised"),
        (f"{TRAIN} {{unit}}", "they look like [0, 1]"),
        (f"{TRAIN} {{nan}}", "not finite"),
        ("benchmark {ck} --data {nan}", "not finite"),
    ),
    *rows(
        "grey against colour, a wrong or odd shape",
        ("benchmark {ck} --data {colour}", "(3, 8, 8)"),
        ("benchmark {ck} --data {larger}", "(1, 12, 12)"),
        ("benchmark {ck} --data {wide}", "(1, 8, 16)"),
        ("benchmark {ck} --data {good}", "the checkpoint has 10 classes"),
        (f"{TRAIN} {{two_channels}}", "C 1 or 3"),
        (f"{TRAIN} {{channel_first}}", "they look channel-first"),
        (f"{TRAIN} {{dots}}", "at least 8x8"),
        ("train --data {colour} --init {ck} --generator none", "give the same --model and data"),
    ),
    *rows(
        "a batch of one, where a loss compares images",
        ("train --batch-size 1", "at least 2 images"),
        ("train --trainer simclr --batch-size 1", "at least 2 images"),
        ("train --trainer supcon --generator none --batch-size 1", "at least 2 images"),
    ),
    *rows(
        "a radius that is none",
        ("train --eps -1", "eps '-1' is not a radius"),
        ("train --eps much", "eps 'much' is not a radius"),
        ("train --eps inf", "eps 'inf' is not a radius"),
        ("train --eps 8/0", "divides by zero"),
        ("train --eps 8", "larger than the whole range"),
        ("train --eps 1e300", "too large"),
        ("train --norm l2 --eps 255", "whole box"),
        ("generate --norm l1 --eps 999", "whole box"),
        ("benchmark {ck} --eps 0.1,much", "'much'"),
        ("benchmark {ck} --norm l2 --eps 255", "whole box"),
        ("benchmark {ck} --norm l0 --eps 1.5", "no number of pixels"),
    ),
    *rows(
        "an unknown norm",
        ("train --norm l7", "'linf', 'l2' or 'l1'"),
        ("generate --norm L-inf", "'linf', 'l2' or 'l1'"),
        ("benchmark {ck} --norm l7", "is not one of"),
        ("benchmark {ck} --attacks pgd:norm=l7", "norm 'l7' is unknown"),
    ),
    *rows(
        "a path of another system, or a name that is none",
        (r"train --data C:\data\images", "no such path"),
        (r"benchmark C:\runs\best.pt", "does not exist"),
        ("train --name ../up", "name"),
        ("train --name a/b", "name"),
        (r"train --name a\b", "name"),
        ("train --name ..", "name"),
        ("train --name .hidden", "name"),
    ),
    *rows(
        "a device that is not there",
        ("train --device cuda:7", "device 'cuda:7' is not there"),
        ("benchmark {ck} --device gpu", "device 'gpu' is unknown"),
    ),
    *rows(
        "a target that is taken or wrong",
        ("generate --out {ck}", "must end in .safetensors"),
        ("generate --out {taken}", "exists already"),
        ("benchmark {ck} --per-image x.txt", "must end in .csv"),
        ("benchmark {ck} --save-examples x.pt", "must end in .safetensors"),
    ),
]

#: What looks like a mistake and is none: it must work. (words, arguments, words of the output)
FINE = [
    ("radius 0", "train {tiny} --eps 0", "best checkpoint"),
    ("images that are not square", "train {tiny} --data {wide} --batch-size 8", "best checkpoint"),
    ("a class that is missing from every batch", "train {tiny} --data {rare} --batch-size 8", "best checkpoint"),
    ("more images asked for than there are", "benchmark {ck} {fast} --n 1000000", "n = 360"),
    ("unicode and spaces in paths", "train {tiny} --out {odd}", "best checkpoint"),
    ("a path as Windows writes them is a name here", r"train {tiny} --out a\b", "best checkpoint"),
    ("more restarts than there is time for", "benchmark {ck} --probes none --quiet --n 20 --time-limit 0.001 --attacks "
     "native:pgd:steps=2:restarts=1000", "not run"),
    ("batches of one, where no loss compares images", "train {tiny} --trainer cross-entropy --generator none --limit 8 "
     "--batch-size 1", "best checkpoint"),
]  # fmt: skip
