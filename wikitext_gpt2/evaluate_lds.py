"""Retrain on random halves of the training set and see how well the stored scores predicted it (LDS).

    python wikitext_gpt2/evaluate_lds.py --scores ekfac identity tfidf --num_masks 100 --num_repeats 5

Prints the mean rank correlation of each kind of scores beside the noise ceiling, draws figure/lds.png, and keeps every
retraining in a bank that a killed run goes on from; wikitext_gpt2/README.md tells costs and figures.
"""

from influence_core.experiments import lds_evaluation
from wikitext_gpt2.task import WikiTextTask

if __name__ == "__main__":
    lds_evaluation.main(WikiTextTask, __doc__)
