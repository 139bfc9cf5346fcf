//! What differs between two runs' settings.

use serde_json::Value;

use super::RunConfig;

impl RunConfig {
    /// Settings that `now` has otherwise, as `name: before -> now`.
    pub fn changes(&self, now: &Self) -> serde_json::Result<Vec<String>> {
        let mut list = Vec::new();
        compare(
            "",
            &serde_json::to_value(self)?,
            &serde_json::to_value(now)?,
            &mut list,
        );
        Ok(list)
    }
}

fn compare(name: &str, before: &Value, now: &Value, list: &mut Vec<String>) {
    if let (Value::Object(before), Value::Object(now)) = (before, now) {
        for (key, now) in now {
            let before = before.get(key).unwrap_or(&Value::Null);
            let name = if name.is_empty() {
                key.clone()
            } else {
                format!("{name}.{key}")
            };
            compare(&name, before, now, list);
        }
    } else if before != now {
        list.push(format!("{name}: {before} -> {now}"));
    }
}
