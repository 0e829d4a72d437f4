"""The refusal judge: full compliance, partial refusal or full refusal, by one linear model; no network.

The modules, each importing only those before it:

    text      cleaned text, sentences, words
    phrases   families of phrases, and traits of questions
    features  question and answer to named features
    model     RefusalJudge: features times weights, numpy alone
    training  labelled answers to weights, and the cross-validation; needs scikit-learn
"""

from axolotl_mote.evaluation.judges.refusal.model import RefusalJudge

__all__ = ["RefusalJudge"]
