//! Tensor names folded into classes: layer and expert numbers become `*`, so that a model of
//! thousands of tensors reads as a dozen lines.

/// The class of a name: every path component that is a number becomes `*`.
pub fn class_of(name: &str) -> String {
    let parts = name.split('.').map(|part| {
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            "*"
        } else {
            part
        }
    });
    parts.collect::<Vec<_>>().join(".")
}

/// Items grouped by class and a second key, in order of first appearance.
pub fn group<T, K: PartialEq>(
    items: impl IntoIterator<Item = T>,
    key: impl Fn(&T) -> (String, K),
) -> Vec<(String, K, Vec<T>)> {
    let mut groups: Vec<(String, K, Vec<T>)> = Vec::new();
    let mut places: std::collections::HashMap<String, Vec<usize>> = std::collections::HashMap::new();
    for item in items {
        let (class, second) = key(&item);
        let known = places.entry(class.clone()).or_default();
        match known.iter().find(|&&i| groups[i].1 == second) {
            Some(&i) => groups[i].2.push(item),
            None => {
                known.push(groups.len());
                groups.push((class, second, vec![item]));
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_stars() {
        assert_eq!(
            class_of("model.layers.12.mlp.experts.7.w1.weight"),
            "model.layers.*.mlp.experts.*.w1.weight"
        );
        let groups = group(["a.1", "b", "a.2"], |name| (class_of(name), ()));
        assert_eq!(groups.len(), 2);
        assert_eq!(groups[0].2, ["a.1", "a.2"]);
    }
}
