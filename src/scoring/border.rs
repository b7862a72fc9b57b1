//! Where a prompt ends and an answer begins, in tokens, and what is cut when both together are too long.
//!
//! A tokenizer may merge the end of a prompt with the beginning of an answer: `"A: "` and `"Yes"` give the
//! token `" Yes"`. So prompt and answer are tokenized jointly, as lm-evaluation-harness does, and the answer
//! begins where the joint tokens part from those of the prompt alone. Where that differs among the answers of
//! a question, all begin at the earliest such place, so that every number is the logarithm of a probability
//! under the same condition.

use serde_json::json;

use crate::Result;
use crate::scorer::{Answer, Message, Miss, Prompt};
use crate::tokenizer::Tokenizer;

/// A question in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// What is given; never empty.
    pub context: Vec<u32>,
    /// What follows, one for each answer.
    pub answers: Vec<Vec<u32>>,
    /// Tokens cut from the front of the prompt.
    pub cut: usize,
}

/// Tokenizes prompts with their answers.
pub struct Border<'a> {
    tokenizer: &'a Tokenizer,
    /// Special tokens before a document.
    lead: Vec<u32>,
    limit: usize,
}

impl<'a> Border<'a> {
    /// For a model that takes `limit` tokens.
    pub fn new(tokenizer: &'a Tokenizer, limit: usize) -> Result<Self> {
        let (with, without) = (tokenizer.encode("a", true)?, tokenizer.encode("a", false)?);
        let at = with.windows(without.len().max(1)).position(|w| w == without);
        let lead = with[..at.unwrap_or(0)].to_vec();
        Ok(Self {
            tokenizer,
            lead,
            limit,
        })
    }

    /// Prompt and answers in tokens, with room for `most` tokens behind the prompt if no answer is longer. `Err`
    /// is a fault of the tokenizer or its chat template; a miss is a question that this model cannot be asked.
    pub fn split(&self, prompt: &Prompt, answers: &[String], most: usize) -> Result<Answer<Split>> {
        let (text, lead) = match prompt {
            Prompt::Text(text) => (text.clone(), self.lead.as_slice()),
            // The template writes the special tokens.
            Prompt::Chat(messages) => (self.tokenizer.chat(&conversation(messages), true)?, &[][..]),
        };
        let encode = |text: &str| -> Result<Vec<u32>> {
            let mut ids = lead.to_vec();
            ids.extend(self.tokenizer.encode(text, false)?);
            Ok(ids)
        };
        let mut context = encode(&text)?;
        let joint = answers.iter().map(|answer| encode(&format!("{text}{answer}")));
        let joint = joint.collect::<Result<Vec<_>>>()?;
        let parting = |ids: &Vec<u32>| context.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let border = joint.iter().map(parting).min().unwrap_or(context.len());
        context.truncate(border);
        let answers: Vec<Vec<u32>> = joint.into_iter().map(|ids| ids[border..].to_vec()).collect();
        if let Some(empty) = answers.iter().position(Vec::is_empty) {
            return Ok(Err(miss(
                "empty answer",
                format!("answer {empty} has no tokens of its own; an empty answer cannot be compared"),
            )));
        }
        let Some(context) = self.started(context) else {
            return Ok(Err(miss(
                "empty prompt",
                "the prompt has no tokens and the tokenizer names no token to begin with".to_owned(),
            )));
        };
        let longest = answers.iter().map(Vec::len).fold(most, usize::max);
        Ok(self.fit(context, longest).map(|(context, cut)| Split {
            context,
            answers,
            cut,
        }))
    }

    /// An empty context begins with the token that begins or ends documents: without one the first token of an
    /// answer has no distribution.
    fn started(&self, context: Vec<u32>) -> Option<Vec<u32>> {
        if !context.is_empty() {
            return Some(context);
        }
        let ids = self.tokenizer.ids();
        Some(vec![ids.bos.or(ids.eos)?])
    }

    /// Cuts a context so that `longest` tokens fit behind it. Special tokens that begin it stay.
    fn fit(&self, mut context: Vec<u32>, longest: usize) -> Answer<(Vec<u32>, usize)> {
        let room = self.limit.saturating_sub(longest);
        let cut = context.len().saturating_sub(room);
        let stays = self.stays(&context);
        if room == 0 || (cut > 0 && room <= stays) {
            let limit = self.limit;
            return Err(miss(
                "too long",
                format!("{longest} tokens of an answer leave no room for a prompt in a context of {limit}"),
            ));
        }
        if cut > 0 {
            context.drain(stays..stays + cut);
        }
        Ok((context, cut))
    }

    /// Special tokens at the front of a context.
    fn stays(&self, context: &[u32]) -> usize {
        if context.starts_with(&self.lead) && !self.lead.is_empty() {
            return self.lead.len();
        }
        usize::from(
            context
                .first()
                .is_some_and(|&id| Some(id) == self.tokenizer.ids().bos),
        )
    }
}

/// A miss of this kind.
pub fn miss(kind: &str, detail: String) -> Miss {
    Miss {
        kind: kind.to_owned(),
        detail,
    }
}

/// A conversation as chat templates take it.
pub fn conversation(messages: &[Message]) -> serde_json::Value {
    messages
        .iter()
        .map(|m| json!({"role": m.role, "content": m.content}))
        .collect()
}
