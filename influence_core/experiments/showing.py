"""What analyze.py says of the scores: the most influential sequences, as text."""

import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from influence_core.scores.self_influence import STAGE as SELF_INFLUENCE
from influence_core.scores.stored import SCORES, pairwise_score_store
from influence_core.study import Study
from influence_core.tasks.example import ExampleTask
from influence_core.tasks.own_queries import OwnQueries

TOP = 5  # sequences that the topic figure looks at
SHOWN_CHARACTERS = 1200  # of a sequence
SHOWN_OWN = 20  # of the user's own queries, where no number was given


def show(
    task: ExampleTask, study: Study, scores: dict[str, Tensor], query_dataset, own_queries: OwnQueries | None, arguments
) -> None:
    """Print the first queries with their most influential training example, and where the scores lie."""
    shown, train_dataset, num_queries = next(iter(scores)), study.train_dataset, len(query_dataset)
    num_shown = arguments.show_queries
    if own_queries is not None and "show_queries" not in arguments.given:
        num_shown = SHOWN_OWN
    if study.sum_queries:
        if num_shown:
            print(describe_sum(task, scores[shown][0], num_queries, train_dataset, shown))
    else:
        for index in range(min(num_shown, num_queries)):
            origin = None if own_queries is None else own_queries.origins[index]
            print(describe_query(task, scores[shown], query_dataset, train_dataset, index, shown, origin))
        if own_queries is not None and num_queries > num_shown:
            print(f"{num_queries - num_shown} more queries are not shown (--show_queries {num_queries} shows all)\n")
        if num_queries and task.topic(query_dataset[0]) is not None:
            print(describe_topics(task, scores, query_dataset, train_dataset))
    rows = f"sum of {num_queries} queries" if study.sum_queries else "queries"
    for name, matrix in scores.items():
        path = pairwise_score_store(study, name, query_dataset, arguments.damping_factor).directory
        print(
            f"Scores ({name}): {tuple(matrix.shape)} [{rows}, training examples] in {path}/pairwise_scores.safetensors"
        )


def describe_query(
    task: ExampleTask,
    scores: Tensor,
    query_dataset,
    train_dataset,
    index: int,
    strategy: str,
    origin: str | None = None,
) -> str:
    """A query and its most influential training example, as text.

    Args:
        origin: where the query is from, if not from the validation split.
    """
    score, best = scores[index].max(0)
    query, train = query_dataset[index], train_dataset[int(best)]
    whence = _whence(task, query, origin or task.origin("validation", index))
    parts = [f"Query {index}{whence}", _indent(task.describe(query))]
    parts += [
        f"  Most influential training sequence ({strategy}): {_name(task, int(best), train)}, score {score:.4g}",
        _indent(task.describe(train)),
    ]
    return "\n".join(parts) + "\n"


def describe_sum(task: ExampleTask, scores: Tensor, num_queries: int, train_dataset, strategy: str) -> str:
    """The most influential training examples for the queries together, as text; scores: [training examples]."""
    parts = [f"Most influential training sequences ({strategy}) for {num_queries} queries together"]
    for score, best in zip(*scores.topk(min(TOP, len(scores)))):
        train = train_dataset[int(best)]
        parts += [f"  {_name(task, int(best), train)}, score {score:.4g}", _indent(task.describe(train))]
    return "\n".join(parts) + "\n"


def _name(task: ExampleTask, index: int, train) -> str:
    """Of a training example: its number, and where it is from."""
    return f"{index}{_whence(task, train, task.origin('train', index))}"


def _whence(task: ExampleTask, example, origin: str | None) -> str:
    """What is known of where an example is from."""
    topic = task.topic(example)
    known = [f"topic: {topic}" if topic is not None else None, origin]
    text = ", ".join(each for each in known if each)
    return f" ({text})" if text else ""


def _indent(text: str) -> str:
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + " […]"
    lines = (textwrap.wrap(line, 112, drop_whitespace=False) or [""] for line in text.splitlines())
    return "\n".join(f"  | {part}" for wrapped in lines for part in wrapped)


def describe_self_influence(task, study, strategies: Sequence[str]) -> str:
    """The training examples with the highest scores of their own."""
    lines = []
    for name in strategies:
        store = study.score_store(study.result_name(name), SELF_INFLUENCE)
        values, indices = store.load()[SELF_INFLUENCE][SCORES].topk(min(TOP, len(study.train_dataset)))
        found = (
            f"{_name(task, index, study.train_dataset[index])} {value:.4g}"
            for value, index in zip(values.tolist(), indices.tolist())
        )
        lines.append(f"Highest self-influence ({name}): {', '.join(found)}")
    return "\n".join(lines)


def describe_topics(task, scores: dict[str, Tensor], query_dataset, train_dataset) -> str:
    """How often a query's top sequences are of its own topic, beside chance."""
    train_topics = [task.topic(example) for example in train_dataset]
    same = torch.tensor(
        [[topic == task.topic(query) for topic in train_topics] for query in query_dataset], dtype=torch.float64
    )
    shares = {
        name: float(same.gather(1, matrix.topk(min(TOP, len(train_topics))).indices).mean())
        for name, matrix in scores.items()
    }
    found = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return (
        f"Of the {TOP} most influential sequences of a query, so many are of the query's own topic: {found} "
        f"(chance {float(same.mean()):.1%}; {len(query_dataset)} queries)\n"
    )
