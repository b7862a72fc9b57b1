//! Replies compared with answers: exact match and F1 of words, after the normalisation of SQuAD's official script
//! (Rajpurkar et al. 2016: lower case, punctuation and the articles a, an, the taken away, blanks joined), with
//! every Chinese character a word of its own, as CMRC 2018 counts.

use std::collections::HashMap;

use super::prompt::is_han;

/// Words of a text after normalisation.
pub fn words(text: &str) -> Vec<String> {
    let mut spaced = String::with_capacity(text.len());
    for c in text.to_lowercase().chars() {
        if is_han(c) {
            spaced.push(' ');
            spaced.push(c);
            spaced.push(' ');
        } else if !is_punctuation(c) {
            spaced.push(c);
        }
    }
    let article = |w: &&str| !matches!(*w, "a" | "an" | "the");
    spaced
        .split_whitespace()
        .filter(article)
        .map(str::to_owned)
        .collect()
}

/// ASCII punctuation, general punctuation (U+2010 to 2027, 2030 to 205E), and the Chinese forms.
fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation()
        || matches!(c, '\u{2010}'..='\u{2027}' | '\u{2030}'..='\u{205e}' | '\u{3001}'..='\u{3003}' | '\u{3008}'..='\u{3011}'
            | '\u{3014}'..='\u{301f}' | '\u{ff01}'..='\u{ff0f}' | '\u{ff1a}'..='\u{ff20}' | '\u{ff3b}'..='\u{ff40}'
            | '\u{ff5b}'..='\u{ff65}' | '·')
}

/// Best exact match (0 or 1) and best F1 over the answers.
pub fn best(reply: &str, answers: &[String]) -> (f64, f64) {
    let reply = words(reply);
    let mut best = (0.0_f64, 0.0_f64);
    for answer in answers {
        let answer = words(answer);
        best.0 = best.0.max(f64::from(u8::from(reply == answer)));
        best.1 = best.1.max(f1(&reply, &answer));
    }
    best
}

/// F1 of two bags of words; of an empty one, whether both are.
fn f1(reply: &[String], answer: &[String]) -> f64 {
    if reply.is_empty() || answer.is_empty() {
        return f64::from(u8::from(reply.is_empty() && answer.is_empty()));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in answer {
        *left.entry(word).or_default() += 1;
    }
    let mut shared = 0usize;
    for word in reply {
        if let Some(count) = left.get_mut(word.as_str()).filter(|c| **c > 0) {
            *count -= 1;
            shared += 1;
        }
    }
    2.0 * shared as f64 / (reply.len() + answer.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best_of(reply: &str, answers: &[&str]) -> (f64, f64) {
        best(
            reply,
            &answers.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn overlaps_by_hand() {
        assert_eq!(best_of("The Eiffel Tower.", &["eiffel tower"]), (1.0, 1.0));
        // Words: in paris france / paris. Precision 1/3, recall 1.
        assert_eq!(best_of("in Paris, France", &["Paris"]), (0.0, 0.5));
        assert_eq!(
            best_of("in Paris, France", &["London", "Paris France"]),
            (0.0, 0.8)
        );
        assert_eq!(best_of("一九四九年。", &["一九四九年"]), (1.0, 1.0));
        // 北京市 / 北京: shared 2 of 3 and 2.
        assert_eq!(best_of("北京市", &["北京"]), (0.0, 0.8));
        assert_eq!(best_of("a a b b", &["b c"]), (0.0, 0.5));
        assert_eq!(best_of("", &["x"]), (0.0, 0.0));
        assert_eq!(best_of("the", &["a"]), (1.0, 1.0));
    }

    #[test]
    fn mixed_text_is_cut_at_chinese_characters() {
        assert_eq!(
            words("用 apt-get 安装「GNOME」"),
            ["用", "aptget", "安", "装", "gnome"]
        );
    }
}
