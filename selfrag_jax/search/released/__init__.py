"""The search of the authors' released scripts, quirks included: published numbers come from it.

The scripts are run_short_form.py and run_long_form_static.py of AkariAsai/self-rag. max_depth=1
is the short-form script, more the long-form one with --use_grounding. What they do differently
from the paper:

  gate (short)   Compares log-probabilities, which inverts it.
  gate (long)    Retrieves if the model generates [Retrieval] within 25 tokens, before a blank
                 line, and the threshold agrees (as of commit f109462; before that, a missing
                 [Retrieval] retrieved, in a version whose search could not run).
  no retrieval   (long) Ends at the first blank line.
  generation     Continues to the end of text or the limit; never ends with a segment.
  scores         See scores.py.
  long form      Depth T gives T - 1 segments. Scores are multiplied. Only nodes that say
                 [Retrieval] are extended; the others are dropped unless they are at the deepest
                 level. The history of child i has the text of child i - 1 in place of its
                 parent's. Passages of earlier segments are not kept. Every step uses the same
                 passages.
  votes          Count texts, character by character: line breaks are deleted; white space and
                 [Continue to Use Evidence] are not.
  answer (short) Line breaks are deleted, and a number sign or colon at the beginning. An answer
                 from passages that was not elected loses only the sign, and only if no critique
                 precedes it.
  answer (long)  [Continue to Use Evidence] stays in the text. With passages, a space follows each
                 full stop, exclamation or question mark inside a word, as in "3.5". For the tasks
                 asqa and eli5, the last character of the path's i-th segment (of those that
                 --ignore_cont leaves) is replaced by a mark, " [i].", though the list of passages
                 may be another; a segment that only criticises shows as a mark; one with the text
                 of an earlier one is left out; a full stop with [Continue to Use Evidence], and
                 ". [1] ", become " [1]. "; and if the best path leaves nothing, or one segment
                 without text, the second best path is the answer.
  unknown        A token outside the 5,000 (short) or 32,000 (long) most likely of a step counts
                 as e^-100 within its group. For IsRel in the long form, -100 is taken as the
                 probability itself. The short form's gate sees 32,016 tokens.

Options: --constraints=[No support / Contradictory] is the long form's --ignore_cont, which leaves
such segments out of the answer, not out of the search. --use_groundness, --use_utility and
--use_seqscore of the short form are weights above 0.

What is not reproduced:

  failures       Their searches crash where passages are to be read and there are none: in mode
                 no_retrieval, and except for asqa and eli5 whenever nothing is retrieved (long);
                 where [No Retrieval] is generated and the threshold is None (long; taken for 0
                 here); in a gate that lacks a token (long); if the only path has no text (long,
                 asqa and eli5); with one passage in mode always_retrieve, and on an empty answer
                 (short). The short form is that of commit ed22968 except for max_depth, which it
                 passes to a function that does not take it.
  tasks          Here all questions with options are voted on, there those of fever and arc_c. In
                 the long form, tasks other than asqa and eli5 are treated as factscore, the only
                 other one.
  tokens         Generated tokens enter the history as they are, not as text that is tokenized
                 again. A control token spelled in a passage or by the model is text. A passage
                 without a title has no empty line in its place. Passages are cut to max_length,
                 and paths end with the model's context.
  text           An answer from passages that was not elected (short) loses its control tokens and
                 the white space around it. White space beside control tokens is that of
                 Tokenizer.decode; theirs depends on the version of vLLM. vLLM also removes tokens
                 that a tokenizer marks as special, unless told not to, which the scripts do not
                 do: where [Retrieval] is marked so, their long form has one segment in mode
                 always_retrieve, and otherwise retrieves nothing.
"""
