"""Retrain on random halves of the questions and see how well the stored scores predicted it (LDS).

    python swag_roberta/evaluate_lds.py --scores ekfac identity tfidf --num_masks 100 --num_repeats 5

Prints the mean rank correlation of each kind of scores beside the noise ceiling, and draws the figure;
swag_roberta/README.md tells costs and figures.
"""

from influence_core.experiments import lds_evaluation
from swag_roberta.task import SwagTask

if __name__ == "__main__":
    lds_evaluation.main(SwagTask, __doc__)
