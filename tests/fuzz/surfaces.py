"""What is changed: each file that a command reads, its format, and the commands that read it."""

from dataclasses import dataclass

from mutations import CONFIG, JSON, JSON_LINES, SAFETENSORS, Format

_RUN = ("inspect", "inspect json", "plan", "convert", "resume", "weights")
_CONVERT = ("plan", "convert", "overwrite")
_OUT = ("structure", "weights", "push plan", "push", "push anyway", "overwrite")
_HALF = ("resume",)
_FOLDERS = ("inspect folders", "convert folders")
_OLDER = ("inspect older", "convert older")


@dataclass(frozen=True)
class Surface:
    """A file to change.

    Attributes:
        file: The file, or folder; a pattern takes the first that there is.
        form: Its format, None for bytes.
        commands: What reads it.
        examples: How many, before `MOECONV_FUZZ` multiplies them.
        full: Commands see every package, transformers among them.
    """

    file: str
    form: Format | None
    commands: tuple[str, ...]
    examples: int = 30
    full: bool = False

    def __str__(self) -> str:
        return f"{self.file}{' (full)' if self.full else ''}"


_STEP = "run/checkpoints/7"
_PARTIAL = "half/.out.moeconv-partial"

SURFACES = (
    # A run.
    Surface("run/moeconv.json", JSON, _RUN, 80),
    Surface("run/metrics.jsonl", JSON_LINES, _CONVERT, 30),
    Surface("folders/config.yml", CONFIG, _FOLDERS, 60),
    Surface("run/tokenizer/tokenizer.json", JSON, (*_CONVERT, "weights"), 40),
    Surface("run/tokenizer/tokenizer_config.json", JSON, _CONVERT, 30),
    Surface("run/tokenizer/special_tokens_map.json", JSON, _CONVERT, 15),
    Surface("run/tokenizer/added_tokens.json", JSON, _CONVERT, 15),
    Surface("run/tokenizer/tokenizer.model", None, _CONVERT, 10),
    Surface("ranks.tiktoken", None, ("ranks",), 20),
    # Its checkpoint.
    Surface(f"{_STEP}/items/_METADATA", JSON, _RUN, 60),
    Surface(f"{_STEP}/_CHECKPOINT_METADATA", JSON, _RUN, 30),
    Surface(f"{_STEP}/commit_success.txt", None, _RUN, 8),
    Surface(f"{_STEP}/items/manifest.ocdbt", None, _RUN, 30),
    Surface(f"{_STEP}/items/d/*", None, _RUN, 40),
    Surface("folders/checkpoints/0/items/*gate*/zarr.json", JSON, _FOLDERS, 50),
    Surface("folders/checkpoints/0/items/*wi_0/c/0/0/0/0", None, _FOLDERS, 20),
    Surface("older/checkpoints/0/items/*gate*/.zarray", JSON, _OLDER, 50),
    Surface("older/checkpoints/0/items/*wi_0/0.0.0.0", None, _OLDER, 20),
    # Another thing in the place of a folder.
    Surface("run/tokenizer", None, _CONVERT, 10),
    Surface("run/checkpoints", None, _RUN, 10),
    Surface(_STEP, None, _RUN, 10),
    Surface(f"{_STEP}/items", None, _RUN, 10),
    Surface(f"{_STEP}/items/d", None, _RUN, 10),
    Surface("folders/checkpoints/0/items/*gate*", None, _FOLDERS, 10),
    Surface(_PARTIAL, None, _HALF, 10),
    Surface("out", None, _OUT, 12),
    # A conversion that stopped half way.
    Surface(f"{_PARTIAL}/journal.jsonl", JSON_LINES, _HALF, 50),
    Surface(f"{_PARTIAL}/*.safetensors", SAFETENSORS, _HALF, 20),
    # An output.
    Surface("out/moeconv.json", JSON, _OUT, 100),
    Surface("out/verify.json", JSON, _OUT, 60),
    Surface("out/config.json", JSON, _OUT, 40),
    Surface("out/generation_config.json", JSON, _OUT, 20),
    Surface("out/model.safetensors.index.json", JSON, _OUT, 30),
    Surface("out/model-00001-of-00002.safetensors", SAFETENSORS, _OUT, 60),
    Surface("out/tokenizer.json", JSON, _OUT, 30),
    Surface("out/tokenizer_config.json", JSON, _OUT, 20),
    Surface("out/README.md", None, ("push plan", "push", "overwrite"), 20),
    # The same with transformers, which reads some of it too.
    Surface("out/config.json", JSON, ("structure",), 40, full=True),
    Surface("out/generation_config.json", JSON, ("structure",), 10, full=True),
    Surface("out/tokenizer.json", JSON, ("structure",), 30, full=True),
    Surface("out/tokenizer_config.json", JSON, ("structure",), 20, full=True),
    Surface("out/moeconv.json", JSON, ("structure", "push"), 30, full=True),
)
