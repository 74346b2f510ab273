"""Remove the articles that influence the queries most, retrain, and see the loss rise and ROUGE-L fall.

    python dailymail_t5/run_counterfactual.py --scores ekfac identity --removal_sizes 0 50 100 150 200

Prints mean query loss and ROUGE-L for each kind of scores and for random removal, and draws the figure;
dailymail_t5/README.md tells figures.
"""

from dailymail_t5.task import DailyMailTask
from influence_core.experiments import counterfactual

if __name__ == "__main__":
    counterfactual.main(DailyMailTask, __doc__)
