"""The examples in the help of each command; a test parses every one."""

EXAMPLES = {
    "init": ("ckpt init", "ckpt init runs/exp1 --codec lossless"),
    "commit": (
        "ckpt commit out/model.pt -m 'lower rate' --metric loss=2.31",
        "ckpt commit out/checkpoint-500 --step 500",
        "ckpt -q commit notes.bin --raw",
    ),
    "import": (
        "ckpt import out --dry-run",
        "ckpt import out --pattern 'step*.pt' --delete-originals",
    ),
    "watch": ("ckpt watch out", "ckpt watch out --keep-local 2 --accept-near"),
    "log": (
        "ckpt log 1000..2000",
        "ckpt log --since '2 days ago' --metric 'loss<3' --sort loss",
        "ckpt log --graph",
    ),
    "show": ("ckpt show 1000", "ckpt show best:loss:min --json", "ckpt show v1 --provenance"),
    "status": ("ckpt status", "ckpt -C runs/exp1 status"),
    "ls": ("ckpt ls", "ckpt ls 1000 'layers.0.*' --only model"),
    "diff": ("ckpt diff", "ckpt diff 1000..2000 --only model", "ckpt diff HEAD~5 -n 10"),
    "bisect": (
        "ckpt bisect 1000 2000 --nan",
        "ckpt bisect 1000 2000 --metric loss --above 3",
        "ckpt bisect 1000 2000 -- python evaluate.py {}",
    ),
    "each": (
        "ckpt each 1000..2000 --metric eval_loss -- python evaluate.py {}",
        "ckpt each .. --jobs 2 -- ./score.sh {} {step}",
    ),
    "cat": ("ckpt cat HEAD:model.layers.0.weight", "ckpt cat 1000:head.bias -o bias.npy"),
    "series": ("ckpt series head.weight", "ckpt series head.weight 1000..2000 --stat norm --csv"),
    "reflog": ("ckpt reflog", "ckpt reflog main --json"),
    "checkout": (
        "ckpt checkout 1000",
        "ckpt checkout -b retry 1000",
        "ckpt checkout best:loss:min -o best.pt",
    ),
    "export": (
        "ckpt export v1 model.safetensors",
        "ckpt export --all steps --every 1000 --format safetensors",
    ),
    "average": (
        "ckpt average 1000..2000 -o mean.pt",
        "ckpt average --last 5 -o mean.safetensors -f",
        "ckpt average --best eval_loss:3 -o best.pt",
        "ckpt average 1000..2000 --like cosine -o cooled.pt",
    ),
    "bundle": ("ckpt bundle v1 release.ckptz", "ckpt bundle 1000..2000 part.ckptz"),
    "clone": ("ckpt clone release.ckptz", "ckpt clone release.ckptz exp1-copy"),
    "fetch": ("ckpt fetch release.ckptz", "ckpt fetch release.ckptz --json"),
    "branch": (
        "ckpt branch",
        "ckpt branch retry 1000",
        "ckpt branch -m main-2 retry",
        "ckpt branch -d retry",
    ),
    "tag": ("ckpt tag v1 best:loss:min", "ckpt tag -d v1"),
    "pin": ("ckpt pin 1000", "ckpt pin"),
    "unpin": ("ckpt unpin 1000", "ckpt unpin HEAD~2"),
    "note": (
        "ckpt note 1000 --metric eval_loss=2.31",
        "ckpt note v1 -m 'the release' --set data=wikitext",
        "ckpt note v1",
    ),
    "gc": (
        "ckpt gc --keep-last 20 --keep-every 1000 --dry-run",
        "ckpt gc --keep-best loss:min --keep-tag",
        "ckpt gc",
    ),
    "drop": ("ckpt drop 1000", "ckpt drop 1000..1500 2000"),
    "undo": ("ckpt undo", "ckpt undo --json"),
    "verify": ("ckpt verify", "ckpt verify --subset 5%", "ckpt verify --repair --from backup"),
    "stats": ("ckpt stats", "ckpt stats --json"),
    "du": ("ckpt du", "ckpt du --by layer"),
    "config": (
        "ckpt config",
        "ckpt config keep-exact 5",
        "ckpt config --user codec lossless",
        "ckpt config keep-exact --unset",
    ),
    "index": ("ckpt index --rebuild",),
    "help": ("ckpt help", "ckpt help commit", "ckpt help --man > ckpt.1"),
    "version": ("ckpt version",),
}
"""Command lines by command."""
