"""What was found, as a table: for each shape a line for every side, with the bound below ours."""

from collections.abc import Iterator

from numpy_ref.errors import plural

from .compare import JOBS
from .peers import PEERS, TRANSFORMERS
from .workers import ANSWER, OURS

LABEL, JOB = 36, 34  # letters
NOTES = """\
bound: a prefill's products at the rate that its kernels reach here, and a step's weights at the rate at which memory is
read here, measured after each round; its ratio says how many times as long ours takes.
GiB: the most while loading and answering, pages that several processes map divided among them; private: of it what no
file backs. Other ratios: how many times faster ours is, and our memory over theirs; decoders are held against ours."""


def table(results: dict) -> str:
    """The figures as text."""
    rows = results["rows"]
    lines = [heading(results), *answers(rows), *figures(rows), NOTES]
    if "outside_share" in rows[0]["sides"][OURS]:
        lines += alone(rows[0])
    return "\n".join(lines)


def heading(results: dict) -> str:
    """What was run."""
    prepacked = ", prepacked" if results["prepack"] else ""
    turns = f"{plural(results['threads'], 'thread')}, medians of {plural(results['rounds'], 'round')} in turns"
    beside = any(TRANSFORMERS in row["sides"] for row in results["rows"])
    against = f"; transformers in {results['against']}" if beside else ""
    return f"{results['precision']} bundle{prepacked}{against}; {turns}"


def shape(row: dict) -> str:
    """A variant, and how many layers it was left."""
    return row["variant"] + (f", {plural(row['layers'], 'layer')} a tower" if row["layers"] else "")


def answers(rows: list[dict]) -> list[str]:
    """Answers a minute, of each job that a row has."""
    found = [(job, row) for job in JOBS for row in rows if job.name in row["sides"][OURS]]
    if not found:
        return []
    lines = ["", f"{'answers a minute':<{LABEL + JOB}}{OURS:>10}{TRANSFORMERS:>14}{'ratio':>8}"]
    for job, row in found:
        line = f"{f'{job.name}, {job.tokens} tokens':<{JOB}}{shape(row):<{LABEL}}{row['sides'][OURS][job.name]:>10.2f}"
        if theirs := row["sides"].get(TRANSFORMERS):
            line += f"{theirs[job.name]:>14.2f}{theirs['ratios'][job.name]:>8.2f}"
        lines.append(line)
    return lines


def figures(rows: list[dict]) -> Iterator[str]:
    """A block for each row."""
    yield ""
    yield f"{'':<{LABEL}}{'first token, s':>15}{'ratio':>7}{'a further, ms':>15}{'ratio':>7}" + (
        f"{'load, s':>9}{'GiB':>8}{'private':>9}{'ratio':>7}"
    )
    for row in rows:
        yield shape(row)
        for side, found in row["sides"].items():
            yield side_line(side, found)
            if side == OURS:
                yield bound_line(found, row["decode_bytes"])
                yield (
                    f"    a step at {found['late_position']} positions takes {found['late_step']:.3f} of one at "
                    f"{found['early_position']}"
                )
        for side, why in row["reasons"].items():
            yield f"  {side}: {why}"
    for side in dict.fromkeys(side for row in rows for side in (*row["sides"], *row["reasons"]) if side in PEERS):
        yield f"{side}: {PEERS[side].note}"


def side_line(side: str, found: dict) -> str:
    """What one side takes, and how ours compares."""
    ratio = {name: f"{value:.2f}" for name, value in found.get("ratios", {}).items()}
    return (
        f"  {side:<{LABEL - 2}}{found['first_token_s']:>15.3f}{ratio.get('first_token_s', ''):>7}"
        f"{found['ms_per_token']:>15.2f}{ratio.get('ms_per_token', ''):>7}"
        f"{found['load_s']:>9.1f}{found['peak_gib']:>8.2f}{found['private_gib']:>9.2f}{ratio.get('peak_gib', ''):>7}"
    ).rstrip()


def bound_line(found: dict, read: int) -> str:
    """What the machine allows."""
    return (
        f"{'    bound':<{LABEL}}{found['least_first_token_s']:>15.3f}{found['first_token_over_least']:>7.2f}"
        f"{found['least_ms_per_token']:>15.2f}{found['token_over_least']:>7.2f}"
        f"  {found['tera_operations_per_s']:.2f} TOP/s; {read / 1e9:.2f} GB at {found['bandwidth_gb_per_s']:.1f} GB/s"
    )


def alone(row: dict) -> list[str]:
    """What our bundle alone was asked."""
    ours = row["sides"][OURS]
    return [
        "",
        f"tokens/s {1000 / ours['ms_per_token']:.2f}; export {ours['export_s']:.1f} s; "
        f"first load {ours['first_load_s']:.1f} s; peak beyond the weights {ours['beyond_weights_gib']:.3f} GiB",
        f"outside of the graphs: {ours['outside_share']:.1%} of an answer of {ANSWER} tokens",
        second_line(ours),
    ]


def second_line(figures: dict) -> str:
    """How long a second question about a picture takes, as text."""
    return (
        "a second question about a picture takes {second_over_first:.2f} of the first: "
        "{second_s:.3f} s to its first token, {first_s:.3f} s from the picture to the first one's"
    ).format(**figures)
