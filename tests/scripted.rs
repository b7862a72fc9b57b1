//! A model that says what a test tells it to.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};

use qtool::Result;
use qtool::scorer::{
    Abilities, Answer, Likelihoods, OnAnswer, Pair, Prompt, Question, Reply, Request, Scorer, Window,
};

type Script<I, O> = Box<dyn Fn(&I) -> O + Send + Sync>;

/// See the module's text. What is not scripted, it is not able to.
#[derive(Default)]
pub struct Scripted {
    pub likelihoods: Option<Script<Question, Answer<Likelihoods>>>,
    pub replies: Option<Script<Request, Answer<Reply>>>,
    /// ln p of the scored tokens.
    pub windows: Option<Script<Window, Vec<f32>>>,
    /// Logits of the scored tokens.
    pub logits: Option<Script<Window, Vec<f32>>>,
    pub classify: Option<(usize, Script<Pair, Vec<f32>>)>,
    pub embed: Option<Script<String, Vec<f32>>>,
    pub asked: AtomicU64,
    pub context: Option<usize>,
}

/// The text of a prompt.
pub fn text(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Chat(messages) => messages
            .iter()
            .map(|m| format!("<{}>{}", m.role, m.content))
            .collect(),
    }
}

/// Likelihoods of one-token answers.
pub fn likely(nats: &[f64]) -> Answer<Likelihoods> {
    Ok(Likelihoods {
        nats: nats.to_vec(),
        tokens: vec![1; nats.len()],
        cut: 0,
    })
}

impl Scripted {
    /// Answers in an order that is not the questions'.
    fn all<I, O>(
        &self,
        items: &[I],
        script: impl Fn(&I) -> O,
        on_answer: &mut dyn FnMut(usize, O) -> ControlFlow<()>,
    ) {
        let backwards = (0..items.len()).rev();
        for i in backwards {
            self.asked.fetch_add(1, Ordering::Relaxed);
            if on_answer(i, script(&items[i])).is_break() {
                return;
            }
        }
    }
}

impl Scorer for Scripted {
    fn abilities(&self) -> Abilities {
        Abilities {
            likelihoods: self.likelihoods.is_some(),
            replies: self.replies.is_some(),
            windows: self.windows.is_some() || self.logits.is_some(),
            labels: self.classify.as_ref().map_or(0, |c| c.0),
            embeddings: self.embed.is_some(),
        }
    }

    fn context(&self) -> Option<usize> {
        self.context
    }

    fn tokenizer_digest(&self) -> Option<String> {
        None
    }

    fn tokens_run(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    fn likelihoods(&self, questions: &[Question], on_answer: OnAnswer<'_, Likelihoods>) -> Result<()> {
        self.all(questions, self.likelihoods.as_ref().unwrap(), on_answer);
        Ok(())
    }

    fn replies(&self, requests: &[Request], on_answer: OnAnswer<'_, Reply>) -> Result<()> {
        self.all(requests, self.replies.as_ref().unwrap(), on_answer);
        Ok(())
    }

    /// A token a byte.
    fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn windows(&self, windows: &[Window], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        let script = self.windows.as_ref().unwrap();
        self.all(windows, |w| Ok(script(w)), on_answer);
        Ok(())
    }

    fn logits(&self, window: &Window) -> Result<Vec<f32>> {
        Ok(self.logits.as_ref().unwrap()(window))
    }

    fn classify(&self, pairs: &[Pair], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        let script = &self.classify.as_ref().unwrap().1;
        self.all(pairs, |p| Ok(script(p)), on_answer);
        Ok(())
    }

    fn embed(&self, texts: &[String], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        let script = self.embed.as_ref().unwrap();
        self.all(texts, |t| Ok(script(t)), on_answer);
        Ok(())
    }
}
