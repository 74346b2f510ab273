"""Retrain on random halves of the articles and see how well the stored scores predicted it (LDS).

    python dailymail_t5/evaluate_lds.py --scores ekfac identity tfidf --num_masks 100 --num_repeats 5

Prints a query with its most influential article and the mean rank correlation of each kind of scores beside the noise
ceiling, and draws the figure; dailymail_t5/README.md tells figures.
"""

from dailymail_t5.task import DailyMailTask
from influence_core.experiments import lds_evaluation

if __name__ == "__main__":
    lds_evaluation.main(DailyMailTask, __doc__)
