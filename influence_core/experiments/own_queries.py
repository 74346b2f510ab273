"""The user's own queries, of analyze.py's flags."""

from influence_core.experiments.arguments import check_size
from influence_core.tasks.example import ExampleTask, is_main_process
from influence_core.tasks.own_queries import OwnQueries, read_queries

NAMED = 5  # of those whose text is cut


def load_own_queries(task: ExampleTask, arguments) -> OwnQueries | None:
    """Those of --query_text or --query_file, the first --num_queries if that was given; None: the data's are meant.

    Raises:
        UserError: see `read_queries`; there are fewer.
    """
    if not arguments.query_text and arguments.query_file is None:
        return None
    queries = read_queries(task, arguments.query_text, arguments.query_file)
    if "num_queries" in arguments.given:  # a preset's number is not of these
        whole = f"set of queries in {queries.source}"
        queries = queries.first(check_size(arguments, "num_queries", len(queries.examples), whole))
    if is_main_process():
        for note in _notes_on_cut(task, queries, arguments):
            print(note)
    return queries


def _notes_on_cut(task: ExampleTask, queries: OwnQueries, arguments) -> list[str]:
    notes = []
    for flag, cut in task.cut_rows(queries.rows).items():
        which = ", ".join(queries.origins[index] for index in cut[:NAMED])
        if len(cut) > NAMED:
            which += f", … ({len(cut)} in all)"
        limit = f"--{flag} {getattr(arguments, flag)}"
        if cut:
            notes.append(f"Note: queries that are longer than {limit} are cut, as the data's texts are: {which}")
    return notes
