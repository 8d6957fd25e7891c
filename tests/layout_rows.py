"""For each layout rows that have the columns of public data sets, with what they hold."""

import json


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def parts(role, text, weight):
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
Q = [user("q")]
TURNS = [user("q1"), assistant("a1"), user("q2")]

# For each layout rows of public columns, and what they hold: the prompt, the texts of the responses, all scores.
ROWS = {
    "groups": [({"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1]}, ("q", "abc", [0.5, 2, -1]))],
    "numbered": [
        (
            {"prompt": "q", "prompt_id": "1", **{f"A{i}": [user("q"), assistant(x)] for i, x in enumerate("abcd")}}
            | {f"score_A{i}": 8.0 - i for i in range(4)},
            (Q, "abcd", [8, 7, 6, 5]),
        )
    ],
    "pairs": [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "ab", [1, 0])),
        # Tulu 3: the prompt again as a text. Skywork: conversations alone.
        (
            {"id": "1", "source": "s", "prompt": "q1", "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
            (TURNS, "ab", [1, 0]),
        ),
        ({"source": "s", "chosen": [*Q, assistant("a")], "rejected": [*Q, assistant("b")]}, (Q, "ab", [1, 0])),
        ({"id": "1", "system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, ([system("s"), *Q], "ab", [1, 0])),
    ],
    "kto": [({"prompt": Q, "completion": [assistant("a")], "label": True}, (Q, "a", [1]))],
    "rated": [({"prompt": "q", "response": "a", "score": 3.5}, (Q, "a", [3.5]))],
    "ultrafeedback_binarized": [
        (
            {
                **{"prompt": "q", "prompt_id": "1", "messages": [*Q, assistant("a")]},
                **{"chosen": [*Q, assistant("a")], "rejected": [*Q, assistant("b")]},
                **{"score_chosen": 8.5, "score_rejected": 7.0},
            },
            (Q, "ab", [8.5, 7]),
        )
    ],
    "scored_pairs": [
        (
            {"rejected": [*Q, assistant("b")], "rejected_score": 2.0, "chosen_score": 5.0, "chosen": [*Q, assistant("a")]},
            (Q, "ab", [5, 2]),
        )
    ],
    "rated_pairs": [
        (
            {
                **{"dataset": "d", "chosen": [*Q, assistant("a")], "rejected": [*Q, assistant("b")]},
                **{"chosen_rating": 5.0, "rejected_rating": 4.0},
            },
            (Q, "ab", [5, 4]),
        )
    ],
    "ultrafeedback_cleaned": [
        (
            {
                **{"source": "s", "prompt": "q", "chosen": [*Q, assistant("a")], "chosen-rating": 5.0, "chosen-model": "m"},
                **{"rejected": [*Q, assistant("b")], "rejected-rating": 3.0, "rejected-model": "n"},
            },
            (Q, "ab", [5, 3]),
        )
    ],
    "capybara": [
        (
            {
                **{"source": "s", "conversation": [{"input": "q1", "output": "a1"}, {"input": "q2", "output": "a"}]},
                **{"original_response": "o", "generation_prompt": ["g"], "raw_generation_responses": ["a", "b"], "prompt": "q2"},
                **{"chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")], "new_generations": ["b"]},
                **{"rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m", "rejected_model": "n"},
            },
            (TURNS, "ab", [5, 2]),
        )
    ],
    "rewarded_pairs": [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 0.3, "rejected_reward": -0.1},
            ("q", "ab", [0.3, -0.1]),
        )
    ],
    "reward_pairs": [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "reward_chosen": 0.3, "reward_rejected": -0.1},
            ("q", "ab", [0.3, -0.1]),
        )
    ],
    "argilla_ultrafeedback": [
        (
            {
                **{"source": "s", "instruction": "q", "chosen_response": "a", "rejected_response": "b"},
                **{"chosen_avg_rating": 4.75, "rejected_avg_rating": 2.0, "chosen_model": "m"},
            },
            (Q, "ab", [4.75, 2]),
        )
    ],
    "distilabel_math": [
        (
            {
                **{"metadata": "{}", "instruction": "q", "chosen_response": "a", "chosen_rating": 9.0},
                **{"rejected_response": "b", "rejected_rating": 8.0},
            },
            (Q, "ab", [9, 8]),
        )
    ],
    "on_policy": [
        (
            {
                **{"prompt_id": "1", "prompt": "q", "all_generated_responses": ["b", "a", "c"], "all_rm_scores": [0.1, 0.3, 0.2]},
                **{"chosen": [*Q, assistant("a")], "rejected": [*Q, assistant("b")]},
            },
            (Q, "bac", [0.1, 0.3, 0.2]),
        )
    ],
    "nectar": [
        (
            {
                "prompt": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: ",
                "answers": [{"answer": "a", "model": "m", "rank": 1.0}, {"answer": "b", "model": "n", "rank": 2.0}],
                **{"turns": 2, "num_responses": 2, "source": ["s"], "good_natured": True},
            },
            (TURNS, "ab", [-1, -2]),
        )
    ],
    "ultrafeedback": [
        (
            {
                **{"source": "s", "instruction": "q", "models": ["m", "n"], "correct_answers": ["None"]},
                "completions": [
                    {
                        **{"model": "m", "principle": "p", "custom_system_prompt": "c", "response": text, "critique": "k"},
                        **{
                            "overall_score": score,
                            "fine-grained_score": score / 2,
                            "annotations": {"helpfulness": {"Rating": "4"}},
                        },
                    }
                    for text, score in (("a", 7.5), ("b", 4.0))
                ],
            },
            (Q, "ab", [7.5, 4]),
        )
    ],
    "ultrafeedback_fine": [
        (
            {
                "instruction": "q",
                "completions": [{"response": "a", "fine-grained_score": 4.5}, {"response": "b", "fine-grained_score": 2.25}],
            },
            (Q, "ab", [4.5, 2.25]),
        )
    ],
    "stack_exchange": [
        (
            {
                "qid": 1,
                "question": "q",
                "answers": [
                    {"answer_id": 1, "author": "x", "pm_score": 3, "selected": True, "text": "a"},
                    {"answer_id": 2, "author": "y", "pm_score": 0, "selected": False, "text": "b"},
                ],
                **{"date": "2020/01/01", "metadata": ["u"]},
            },
            (Q, "ab", [3, 0]),
        )
    ],
    "distilabel": [
        (
            {
                **{"system": "s", "input": "q", "chosen": "b", "rejected": "a", "generations": ["a", "b"], "rating": [8.0, 9.0]},
                **{"order": ["rejected", "chosen"], "status": "swapped", "chosen_score": 9.0, "in_gsm8k_train": False},
            },
            ([system("s"), *Q], "ab", [8, 9]),
        )
    ],
    "distilabel_ratings": [
        ({"instruction": "q", "generations": ["a", "b"], "ratings": [4, 2], "rationales": ["x", "y"]}, (Q, "ab", [4, 2]))
    ],
    "openhermes": [
        (
            {
                **{"source": "s", "category": "c", "prompt": "q", "candidates_completions": ["a", "b", "c"], "ranks": [2, 1, 3]},
                **{"rank_str": "B>A>C", "chosen": [*Q, assistant("b")], "rejected": [*Q, assistant("c")]},
            },
            (Q, "abc", [-2, -1, -3]),
        )
    ],
    "webgpt": [
        (
            {
                "question": {"dataset": "eli5", "id": "1", "full_text": "q"},
                **{"quotes_0": {"extract": ["e"]}, "answer_0": "a", "score_0": 0.5, "quotes_1": {"extract": ["f"]}},
                **{"answer_1": "b", "score_1": -0.5},
            },
            (Q, "ab", [0.5, -0.5]),
        )
    ],
    "shp": [
        (
            {
                **{"post_id": "p", "domain": "d", "history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
                **{"score_A": 52, "score_B": 10, "score_ratio": 5.2},
            },
            (Q, "ab", [52, 10]),
        )
    ],
    "helpsteer": [
        (
            {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2},
            (Q, "a", [3]),
        ),
        (
            {"prompt": "q1<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2", "response": "a", "helpfulness": 3, "correctness": 4},
            (TURNS, "a", [3]),
        ),
    ],
    "summarize_axis": [
        (
            {
                "info": {"id": "1", "post": "p", "title": "t", "subreddit": "r", "site": None, "article": None},
                "summary": {"text": "a", "policy": "sup", "note": "n", "axes": {"overall": 6, "accuracy": 7}},
                **{"worker": "w", "batch": "b", "split": "test"},
            },
            ([user("t\np")], "a", [6]),
        )
    ],
    "helpsteer2_preference": [
        (
            {
                **{"split": "train", "prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2},
                "preference_statement": "Response 1 is better",
            },
            (Q, "ab", [1, -1]),
        )
    ],
    "helpsteer3": [
        (
            {
                **{"domain": "general", "language": "english", "context": TURNS, "response1": "a", "response2": "b"},
                **{"overall_preference": 3, "individual_preference": [{"score": 3, "reasoning": "r"}]},
            },
            (TURNS, "ab", [-1.5, 1.5]),
        )
    ],
    "pku_saferlhf": [
        (
            {
                **{"prompt": "q", "response_0": "a", "response_1": "b", "prompt_source": "s", "is_response_0_safe": True},
                **{"is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 0},
            },
            (Q, "ab", [0, 1]),
        )
    ],
    "summarize_comparisons": [
        (
            {
                "info": {"id": "1", "post": "p", "title": "t", "subreddit": "r", "site": None, "article": None},
                "summaries": [{"text": "a", "policy": "x", "note": None}, {"text": "b", "policy": "y", "note": None}],
                **{"choice": 1, "worker": "w", "extra": {"confidence": 5}},
            },
            ([user("t\np")], "ab", [0, 1]),
        )
    ],
    "alpaca_farm": [
        (
            {"instruction": "do", "input": "it", "output_1": "a", "output_2": "b", "preference": 2, "raw_preference": 1.7},
            ([user("do\nit")], "ab", [0, 1]),
        )
    ],
    "arena": [
        (
            {
                **{"question_id": "1", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "j", "turn": 1},
                **{"conversation_a": [*Q, assistant("a")], "conversation_b": [*Q, assistant("b")]},
            },
            (Q, "ab", [0, 1]),
        )
    ],
    "preference_collection": [
        (
            {
                **{"orig_instruction": "q", "orig_response_A": "a", "orig_response_B": "b", "orig_preference": "A"},
                **{"instruction": "judge", "output": "o"},
            },
            (Q, "ab", [1, 0]),
        )
    ],
    "ultrainteract": [
        (
            {"task": "Coding", "trajectory": [{"from": "user", "value": "q"}], "chosen": "a", "rejected": "b", "id": "1"},
            (Q, "ab", [1, 0]),
        )
    ],
    "hh_rlhf": [
        (
            {
                "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: a",
                "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: b",
            },
            (TURNS, "ab", [1, 0]),
        )
    ],
    "llamafactory_sharegpt": [
        (
            {
                **{"conversations": [human("q1"), gpt("a1"), human("q2")], "chosen": gpt("a"), "rejected": gpt("b")},
                **{"system": "s", "tools": json.dumps([TOOL])},
            },
            ([system("s"), *TURNS], "ab", [1, 0]),
        )
    ],
    "llamafactory_alpaca": [
        (
            {"instruction": "do", "input": "it", "chosen": "a", "rejected": "b", "history": [["q1", "a1"]]},
            ([user("q1"), assistant("a1"), user("do\nit")], "ab", [1, 0]),
        )
    ],
    "llamafactory_v1": [
        (
            {
                "chosen_messages": [parts("user", "q", 0.0), parts("assistant", "a", 1.0)],
                "rejected_messages": [parts("user", "q", 0.0), parts("assistant", "b", 1.0)],
            },
            (Q, "ab", [1, 0]),
        )
    ],
    "axolotl": [({"messages": TURNS, "chosen": assistant("a"), "rejected": assistant("b")}, (TURNS, "ab", [1, 0]))],
    "intel_orca": [({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, ([system("s"), *Q], "ab", [1, 0]))],
    "distilabel_orca": [({"system": "", "input": "q", "chosen": "a", "rejected": "b"}, (Q, "ab", [1, 0]))],
    "chosen_response": [
        (
            {"messages": Q, "chosen_response": assistant("a"), "rejected_response": assistant("b"), "tools": [json.dumps(TOOL)]},
            (Q, "ab", [1, 0]),
        )
    ],
    "swift": [({"messages": [system("s"), *Q, assistant("a")], "rejected_response": "b"}, ([system("s"), *Q], "ab", [1, 0]))],
    "swift_messages": [
        ({"messages": [*TURNS, assistant("a")], "rejected_messages": [*TURNS, assistant("b")]}, (TURNS, "ab", [1, 0]))
    ],
    "stack_exchange_paired": [({"qid": 1, "question": "q", "response_j": "a", "response_k": "b", "date": "d"}, (Q, "ab", [1, 0]))],
    "kto_messages": [({"messages": [*Q, assistant("a")], "label": False}, (Q, "a", [0]))],
    "llamafactory_kto": [({"messages": [*Q, assistant("a")], "kto_tag": True}, (Q, "a", [1]))],
    "llamafactory_kto_conversations": [({"conversations": [human("q"), gpt("a")], "kto_tag": False}, (Q, "a", [0]))],
    "llamafactory_kto_alpaca": [({"instruction": "q", "input": "", "output": "a", "kto_tag": True}, (Q, "a", [1]))],
}
