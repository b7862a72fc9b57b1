//! An encoder run here as a scorer, against each text alone. That its forward pass is right is `encoders.rs`'s
//! business.

use std::ops::ControlFlow;
use std::path::Path;

use qtool::model::Batch;
use qtool::scorer::Pair;
use qtool::scoring::local::Options;
use qtool_kernels::{Backend, CpuBackend, Isa};

use super::{gather, request};

/// An encoder's answers are those of each text alone, and long texts are cut and counted.
#[test]
fn encoders_classify_and_embed_as_scorers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/encoders");
    let texts = [
        "the cat sat on the mat",
        "a dog",
        "你好",
        "",
        "the the the the the the the the the the the",
    ];
    let bare = tempfile::tempdir().unwrap();
    for (from, file) in [
        ("bert-bare", "config.json"),
        ("bert-bare", "model.safetensors"),
        ("bert", "tokenizer.json"),
    ] {
        std::fs::copy(root.join(from).join(file), bare.path().join(file)).unwrap();
    }
    for (name, labels) in [("bert", 3), ("bert-bare", 0)] {
        let options = Options {
            batch_tokens: Some(12),
            context: Some(9),
            ..Options::default()
        };
        let folder = if name == "bert" {
            root.join(name)
        } else {
            bare.path().to_owned()
        };
        let scorer = qtool::scoring::open(CpuBackend::new(Isa::best()), &folder, options).unwrap();
        let abilities = scorer.abilities();
        assert_eq!(
            (abilities.labels, abilities.embeddings, abilities.likelihoods),
            (labels, true, false)
        );
        let source = std::sync::Arc::new(qtool::source::Source::open(&folder).unwrap());
        let model = qtool::model::Encoder::open(CpuBackend::new(Isa::best()), source)
            .unwrap()
            .load()
            .unwrap();
        let tokenizer = qtool::tokenizer::Tokenizer::open(&folder).unwrap();
        let alone = |a: &str, b: Option<&str>| Batch::of_rows([&tokenizer.encode_row(a, b, 9).unwrap()]);
        let near =
            |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        let owned: Vec<String> = texts.iter().map(|t| (*t).to_owned()).collect();
        let found = gather(texts.len(), |on| scorer.embed(&owned, on));
        for (text, found) in texts.iter().zip(found) {
            let expected = model
                .backend()
                .download(&model.embed(&alone(text, None)).unwrap());
            assert!(near(&found.unwrap(), &expected), "{name} {text}");
        }
        assert_eq!(scorer.texts_cut(), 1);
        let pairs: Vec<Pair> = texts
            .iter()
            .map(|t| Pair {
                a: (*t).to_owned(),
                b: Some("a dog".to_owned()),
            })
            .collect();
        if labels == 0 {
            let refused = scorer
                .classify(&pairs, &mut |_, _| ControlFlow::Continue(()))
                .unwrap_err()
                .to_string();
            assert!(refused.contains("no sequence-classification head"), "{refused}");
            continue;
        }
        let found = gather(pairs.len(), |on| scorer.classify(&pairs, on));
        for (pair, found) in pairs.iter().zip(found) {
            let expected = model.classify(&alone(&pair.a, pair.b.as_deref())).unwrap();
            let expected = model.backend().download(&expected);
            assert!(
                expected.len() == 3 && near(&found.unwrap(), &expected),
                "{}",
                pair.a
            );
        }
        let request = request("a", 1);
        let refused = scorer
            .replies(&[request], &mut |_, _| ControlFlow::Continue(()))
            .unwrap_err();
        assert!(refused.to_string().contains("it is an encoder"));
    }
}
