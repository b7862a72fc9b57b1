//! A model run here as a scorer, against its own plain forward pass: one sequence at a time, no prefix, every
//! logit. That the forward pass is right is `forward.rs`'s business.

mod encoder;

use std::ops::ControlFlow;
use std::path::Path;

use qtool::model::Batch;
use qtool::scorer::{Answer, Likelihoods, Message, Prompt, Question, Reply, Request, Scorer, Window};
use qtool::scoring::local::{LocalScorer, Options};
use qtool_kernels::{Backend, CpuBackend, Isa};

use crate::model::{SAMPLES, sample};

/// Of sums of ln p: what rounding of logits in f32 leaves.
const NATS: f64 = 1e-4;

fn open(folder: &Path, options: Options) -> LocalScorer<CpuBackend> {
    LocalScorer::open(CpuBackend::new(Isa::best()), folder, options).unwrap()
}

fn text(prompt: &str) -> Prompt {
    Prompt::Text(prompt.to_owned())
}

fn question(prompt: &str, answers: &[&str]) -> Question {
    Question {
        prompt: text(prompt),
        answers: answers.iter().map(|a| (*a).to_owned()).collect(),
    }
}

fn request(prompt: &str, most: usize) -> Request {
    Request {
        prompt: text(prompt),
        most,
        stop: Vec::new(),
        allowed: None,
        schema: None,
    }
}

/// All answers in the order of the questions; each must come exactly once.
fn gather<T: Clone>(
    count: usize,
    ask: impl FnOnce(&mut dyn FnMut(usize, Answer<T>) -> ControlFlow<()>) -> qtool::Result<()>,
) -> Vec<Answer<T>> {
    let mut answers: Vec<Option<Answer<T>>> = vec![None; count];
    ask(&mut |index, answer| {
        assert!(answers[index].replace(answer).is_none(), "{index} answered twice");
        ControlFlow::Continue(())
    })
    .unwrap();
    answers.into_iter().map(|a| a.expect("an answer")).collect()
}

fn likelihoods(scorer: &dyn Scorer, questions: &[Question]) -> Vec<Answer<Likelihoods>> {
    gather(questions.len(), |on_answer| {
        scorer.likelihoods(questions, on_answer)
    })
}

fn replies(scorer: &dyn Scorer, requests: &[Request]) -> Vec<Answer<Reply>> {
    gather(requests.len(), |on_answer| scorer.replies(requests, on_answer))
}

/// ln p of the tokens from `from` on, by the plain forward pass.
fn plainly(scorer: &LocalScorer<CpuBackend>, ids: &[u32], from: usize) -> Vec<f64> {
    let model = scorer.model();
    let logits = model.forward(&Batch::new(&[ids])).unwrap();
    let logits = model.backend().download(&logits);
    let rows: Vec<&[f32]> = logits.chunks_exact(model.decoder().vocabulary).collect();
    let one = |at: usize| {
        let exps = rows[at - 1].iter().map(|&l| f64::from(l).exp());
        f64::from(rows[at - 1][ids[at] as usize]) - exps.sum::<f64>().ln()
    };
    (from..ids.len()).map(one).collect()
}

const SHOTS: &str = "The file system holds files.\nQuestion: what holds files?\nAnswer: the file system\n\
                     The package manager installs packages.\nQuestion: what installs packages?\nAnswer: the package manager\n";

/// A task's questions behind common examples, with answers of one and of many tokens, and two strays.
fn questions() -> Vec<Question> {
    let mut all: Vec<Question> = [
        (
            "The kernel starts first.\nQuestion: what starts?\nAnswer:",
            &[" the kernel", " a server", " Debian"][..],
        ),
        (
            "Users have accounts.\nQuestion: who has accounts?\nAnswer:",
            &[" users", " the administrator of the server"],
        ),
        (
            "A server answers.\nQuestion: what answers?\nAnswer:",
            &[" a", " b", " c", " d"],
        ),
        ("Names have addresses. \nQuestion: \nAnswer:", &[" yes", " no"]),
    ]
    .iter()
    .map(|(own, answers)| question(&format!("{SHOTS}{own}"), answers))
    .collect();
    all.push(question("服务器", &["的配置", "管理"]));
    all.push(question("", &["The", " installation"]));
    all
}

#[test]
fn likelihoods_are_those_of_the_plain_forward_pass() {
    for name in SAMPLES {
        let scorer = open(&sample(name), Options::default());
        let questions = questions();
        let mut compared = 0;
        for (question, answer) in questions.iter().zip(likelihoods(&scorer, &questions)) {
            let answer = answer.unwrap();
            assert_eq!(answer.cut, 0);
            let Prompt::Text(prompt) = &question.prompt else {
                panic!()
            };
            // None of these answers merges with its prompt; an empty prompt begins with <s>.
            let mut context = scorer.tokenize(prompt).unwrap();
            if context.is_empty() {
                context.push(1);
            }
            for ((text, nats), tokens) in question.answers.iter().zip(&answer.nats).zip(&answer.tokens) {
                let own = scorer.tokenize(text).unwrap();
                assert_eq!(own.len(), *tokens, "{text}");
                let expected: f64 = plainly(&scorer, &[context.as_slice(), &own].concat(), context.len())
                    .iter()
                    .sum();
                assert!((nats - expected).abs() < NATS, "{name} {text}: {nats} {expected}");
                compared += 1;
            }
        }
        assert_eq!(compared, 15);
    }
}

/// An answer that merges with the end of its prompt begins where the merged token does, and so do its rivals.
#[test]
fn tokens_across_the_border_belong_to_the_answer() {
    let scorer = open(&sample("tiny-ernie45"), Options::default());
    let (prompt, answers) = ("the pack", ["age manager", "et"]);
    let prompt_ids = scorer.tokenize(prompt).unwrap();
    let joint: Vec<Vec<u32>> = answers
        .iter()
        .map(|a| scorer.tokenize(&format!("{prompt}{a}")).unwrap())
        .collect();
    assert!(
        !joint[0].starts_with(&prompt_ids),
        "{prompt_ids:?} {joint:?} merge"
    );
    let parting = |ids: &[u32]| prompt_ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
    let border = parting(&joint[0]).min(parting(&joint[1]));
    assert!(border >= 1);
    let found = likelihoods(&scorer, &[question(prompt, &answers)])
        .remove(0)
        .unwrap();
    for ((nats, tokens), ids) in found.nats.iter().zip(&found.tokens).zip(&joint) {
        let expected: f64 = plainly(&scorer, ids, border).iter().sum();
        assert!((nats - expected).abs() < NATS, "{nats} {expected}");
        assert_eq!(*tokens, ids.len() - border);
    }
}

#[test]
fn batches_prefixes_and_threads_change_nothing_but_rounding() {
    let options = |batch_tokens, share_prefixes| Options {
        batch_tokens: Some(batch_tokens),
        share_prefixes,
        ..Options::default()
    };
    let folder = sample("tiny-ernie45-moe");
    let questions = questions();
    let whole = open(&folder, options(4096, true));
    let expected = likelihoods(&whole, &questions);
    for (batch_tokens, share) in [(1, true), (1, false), (60, true), (4096, false)] {
        let scorer = open(&folder, options(batch_tokens, share));
        for (a, b) in likelihoods(&scorer, &questions).iter().zip(&expected) {
            let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
            assert_eq!(a.tokens, b.tokens);
            let off = a
                .nats
                .iter()
                .zip(&b.nats)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f64::max);
            assert!(off < NATS, "{batch_tokens} {share}: {off:e}");
        }
        if !share && batch_tokens == 4096 {
            let (with, without) = (whole.tokens_run(), scorer.tokens_run());
            assert!(
                with * 2 < without,
                "{with} tokens with sharing, {without} without"
            );
        }
    }
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| likelihoods(&open(&folder, options(100, true)), &questions))
    };
    let one = run(1);
    assert!(run(2) == one && run(3) == one);
    // A second call finds the prefix of the first, and the same numbers.
    let before = whole.tokens_run();
    assert_eq!(likelihoods(&whole, &questions), expected);
    assert!(whole.tokens_run() - before < before);
}

#[test]
fn long_prompts_lose_their_front_and_long_answers_are_missed() {
    let options = Options {
        context: Some(12),
        ..Options::default()
    };
    let scorer = open(&sample("tiny-ernie45"), options);
    assert_eq!(scorer.context(), Some(12));
    let long = "The kernel starts first, then the server, then the users.";
    let answers = [" the administrator", " a"];
    let questions = [
        question(long, &answers),
        question(long, &[&" package".repeat(12)]),
        question(long, &[" a", ""]),
    ];
    let found = likelihoods(&scorer, &questions);
    let (ids, answer) = (scorer.tokenize(long).unwrap(), found[0].as_ref().unwrap());
    let own = answers.map(|a| scorer.tokenize(a).unwrap());
    let room = 12 - own[0].len().max(own[1].len());
    assert_eq!(answer.cut, ids.len() - room);
    for (own, nats) in own.iter().zip(&answer.nats) {
        let kept = &ids[answer.cut..];
        let expected: f64 = plainly(&scorer, &[kept, own].concat(), kept.len()).iter().sum();
        assert!((nats - expected).abs() < NATS);
    }
    for (found, (kind, part)) in found[1..]
        .iter()
        .zip([("too long", "context of 12"), ("empty answer", "answer 1")])
    {
        let miss = found.as_ref().unwrap_err();
        assert_eq!(miss.kind, kind);
        assert!(miss.detail.contains(part), "{}", miss.detail);
    }
    let cut = replies(&scorer, &[request(long, 4)]).remove(0).unwrap().cut;
    assert_eq!(cut, ids.len() - 8);
    assert_eq!(
        replies(&scorer, &[request(long, 12)]).remove(0).unwrap_err().kind,
        "too long"
    );
    let window = Window {
        ids: vec![5; 13],
        context: 1,
    };
    let missed = gather(1, |on| scorer.windows(std::slice::from_ref(&window), on)).remove(0);
    assert_eq!(missed.unwrap_err().kind, "too long");
    assert!(
        scorer
            .logits(&window)
            .unwrap_err()
            .to_string()
            .contains("context of 12")
    );
}

#[test]
fn windows_score_what_is_not_given() {
    let scorer = open(
        &sample("tiny-ernie45"),
        Options {
            batch_tokens: Some(30),
            ..Options::default()
        },
    );
    let ids: Vec<u32> = (0..40).map(|i| 300 + i * 37 % 1000).collect();
    let window = |length: usize, context| Window {
        ids: ids[..length].to_vec(),
        context,
    };
    let windows = [
        window(40, 0),
        window(20, 1),
        window(12, 9),
        window(5, 5),
        window(1, 0),
    ];
    let found = gather(windows.len(), |on| scorer.windows(&windows, on));
    let vocabulary = scorer.model().decoder().vocabulary;
    for (window, found) in windows.iter().zip(found) {
        let (found, from) = (found.unwrap(), window.context.max(1));
        let expected = plainly(&scorer, &window.ids, from);
        assert_eq!(found.len(), expected.len());
        let near = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() < NATS;
        assert!(found.iter().zip(&expected).all(near), "{found:?} {expected:?}");
        let logits = scorer.logits(window).unwrap();
        assert_eq!(logits.len(), found.len() * vocabulary);
        for ((row, nats), at) in logits.chunks_exact(vocabulary).zip(&found).zip(from..) {
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            let own = f64::from(row[window.ids[at] as usize]) - sum.ln();
            assert!((own - f64::from(*nats)).abs() < NATS);
        }
    }
}

#[test]
fn replies_are_those_of_one_sequence_at_a_time() {
    for name in SAMPLES {
        let folder = sample(name);
        let scorer = open(
            &folder,
            Options {
                batch_tokens: Some(64),
                ..Options::default()
            },
        );
        let prompts = [
            "The package manager",
            "服务器的",
            "To install Debian,",
            "The",
            "In the file /etc/",
        ];
        let mut requests: Vec<Request> = prompts.iter().map(|p| request(p, 24)).collect();
        requests.extend(prompts.iter().map(|p| request(&format!("{SHOTS}{p}"), 9)));
        requests.push(request("nothing", 0));
        let found = replies(&scorer, &requests);
        let mut words = 0;
        for (request, found) in requests.iter().zip(&found) {
            let Prompt::Text(prompt) = &request.prompt else {
                panic!()
            };
            let ids = scorer.tokenize(prompt).unwrap();
            let alone = scorer
                .model()
                .generate(&ids, request.most, scorer.stops())
                .unwrap();
            let alone = scorer.tokenizer().decode(&alone, true).unwrap();
            assert_eq!(found.as_ref().unwrap().text, alone, "{name} {prompt}");
            words += alone.split_whitespace().count();
        }
        assert!(words > 50, "{words}");
        // A stop ends a reply before it.
        let full = &found[0].as_ref().unwrap().text;
        let stop: String = full.chars().skip(3).take(4).collect();
        let stopped = Request {
            stop: vec!["\u{1}".to_owned(), stop.clone()],
            ..requests[0].clone()
        };
        let text = replies(&scorer, &[stopped]).remove(0).unwrap().text;
        assert_eq!(text, full[..full.find(&stop).unwrap()]);
        assert!(text.len() < full.len());
    }
}

/// Among allowed replies, greedy choice picks by the first token in which they differ.
#[test]
fn replies_are_kept_to_those_allowed() {
    let scorer = open(&sample("tiny-ernie45"), Options::default());
    let ask = |prompt: &str, allowed: &[&str]| {
        let allowed = Some(allowed.iter().map(|a| (*a).to_owned()).collect());
        let request = Request {
            allowed,
            ..request(prompt, 1)
        };
        replies(&scorer, &[request]).remove(0)
    };
    let first = |prompt: &str, answers: &[&str]| {
        let question = question(prompt, answers);
        let nats = likelihoods(&scorer, &[question]).remove(0).unwrap().nats;
        (0..nats.len())
            .max_by(|&a, &b| nats[a].total_cmp(&nats[b]))
            .unwrap()
    };
    let answers = [" a", " the", " Debian", " 0", " 1"];
    let mut chosen = std::collections::BTreeSet::new();
    for prompt in ["The package manager of", "This is", "port", "chapter", "version"] {
        let best = first(prompt, &answers);
        assert_eq!(ask(prompt, &answers).unwrap().text, answers[best], "{prompt}");
        chosen.insert(best);
    }
    assert!(chosen.len() > 1, "{chosen:?}");
    // Replies of many tokens come whole, whatever `most` says.
    let long = [" the administrator of the server", " qwertz uiop"];
    assert!(long.contains(&ask("This is", &long).unwrap().text.as_str()));
    // One reply begins another: the end of text decides, and here the model goes on.
    let nested = ask("The package", &[" manager", " manager of the system"])
        .unwrap()
        .text;
    assert_eq!(nested, " manager of the system");
    assert_eq!(ask("x", &[]).unwrap_err().kind, "nothing allowed");
    assert_eq!(ask("x", &[""]).unwrap_err().kind, "empty answer");
}

#[test]
fn a_run_can_be_broken_off_and_keeps_what_was_answered() {
    let scorer = open(
        &sample("tiny-ernie45"),
        Options {
            batch_tokens: Some(1),
            ..Options::default()
        },
    );
    let questions = questions();
    let mut answered = 0;
    scorer
        .likelihoods(&questions, &mut |_, answer| {
            answered += usize::from(answer.is_ok());
            if answered == 2 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
    assert_eq!(answered, 2);
}

/// What is asked again after an interruption runs in the batches of the whole list: same numbers, to the last bit.
#[test]
fn a_resumed_run_gives_the_same_bits() {
    let options = Options {
        batch_tokens: Some(60),
        ..Options::default()
    };
    let scorer = open(&sample("tiny-ernie45-moe"), options);
    let questions = questions();
    let whole = likelihoods(&scorer, &questions);
    for open in [&[0usize, 3][..], &[1, 2, 4], &[5]] {
        let mut found = Vec::new();
        let keep = &mut |index, answer| {
            found.push((index, answer));
            ControlFlow::Continue(())
        };
        scorer.likelihoods_of(&questions, open, keep).unwrap();
        found.sort_by_key(|(index, _)| *index);
        let expected: Vec<_> = open.iter().map(|&i| (i, whole[i].clone())).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn what_a_language_model_cannot_do_is_said() {
    let scorer = open(&sample("tiny-ernie45"), Options::default());
    let abilities = scorer.abilities();
    assert!(abilities.likelihoods && abilities.replies && abilities.windows && !abilities.embeddings);
    assert_eq!(abilities.labels, 0);
    let nothing = &mut |_, _| ControlFlow::Continue(());
    let refused = scorer.embed(&["a".to_owned()], nothing).unwrap_err().to_string();
    assert!(refused.contains("tiny-ernie45: cannot embed"), "{refused}");
    let chat = Question {
        prompt: Prompt::Chat(vec![Message {
            role: "user".to_owned(),
            content: "a".to_owned(),
        }]),
        answers: vec!["b".to_owned()],
    };
    let refused = scorer.likelihoods(&[chat], &mut |_, _| ControlFlow::Continue(()));
    assert!(refused.unwrap_err().to_string().contains("chat template"));
}
