"""Remove the sequences that influence the queries most, retrain, and see the queries' perplexity rise.

    python wikitext_gpt2/run_counterfactual.py --scores ekfac identity --removal_sizes 0 50 100 150 200

Prints the mean query perplexity for each kind of scores and for random removal, and draws figure/counterfactual.png;
wikitext_gpt2/README.md tells costs and figures.
"""

from influence_core.experiments import counterfactual
from wikitext_gpt2.task import WikiTextTask

if __name__ == "__main__":
    counterfactual.main(WikiTextTask, __doc__)
