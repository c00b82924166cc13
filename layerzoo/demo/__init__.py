"""`layerzoo demo`: real work in a few minutes, one table and one page. A family adds its part to `PARTS`."""

from pathlib import Path
from time import perf_counter

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

try:
    from layerzoo.demo.acceleration import accelerate_transformers
    from layerzoo.demo.denoising import denoise_digits
    from layerzoo.demo.images import classify_digits
    from layerzoo.demo.language import write_text
    from layerzoo.demo.report import Part, Section, write_report
except ImportError as error:
    raise ImportError(f"the demo needs the extra [bench]: pip install 'layerzoo[bench]' ({error})") from error

PARTS: dict[str, Part] = {
    "A language model from layerzoo.nn.Mamba": write_text,
    "transformers' Mamba, before and after layerzoo.accelerate": accelerate_transformers,
    "A vision transformer of timm with layerzoo.nn.VisionMamba for attention and SparseMoE for MLPs": classify_digits,
    "A UNet of diffusers with layerzoo.nn.UShapeMamba in its middle": denoise_digits,
}


def run_demo(out: Path, quick: bool) -> None:
    """Runs every part, prints one table and writes `out`/report.html, a page that needs no network.

    A part whose host is not installed is left out, with a line that says so. Raises RuntimeError where a part does not
    reach what it states. `quick` is for tests: small and not impressive.
    """
    start = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        sections = {title: _run(part, quick, progress) for title, part in PARTS.items()}
    write_report(sections, perf_counter() - start, out / "report.html")


def _run(part: Part, quick: bool, progress: Progress) -> Section:
    try:
        return part(quick, progress)
    except ImportError as error:
        if (error.name or "layerzoo").startswith("layerzoo"):  # no host, and so a fault
            raise
        return Section(f"Not run: {error}.")
