//! The canvas of `denoised play` and who stands where in it: what keys do, and how it is drawn.

use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout as Rows};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Paragraph, Wrap};

use crate::cli::Failed;
use crate::cli::canvas::{Held, Position, Snapshot};
use crate::cli::layout::{Layout, Looks};
use crate::client;
use crate::proto::v1::template_part::Part;
use crate::proto::v1::{Draft, Gap, TemplatePart, TokenList, draft};

/// Texts that can be gone back to, at most.
const HISTORY: usize = 100;

const HELP: &str = "arrows move · space selects · g gap · n noise again · i insert · d delete · e edit · u undo · enter denoises · q quits";

/// What happens to a position with the next denoising.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Stays,
    Gap,
    Draft,
}

/// A position, with its token and what is to become of it.
#[derive(Clone, Debug, PartialEq)]
struct Cell {
    token: u32,
    position: Position,
    mark: Mark,
}

/// The canvas and who stands where in it.
#[derive(Debug, Default)]
pub(super) struct Session {
    cells: Vec<Cell>,
    step: u32,
    cursor: usize,
    /// Where the selection began, which ends at the cursor.
    anchor: Option<usize>,
    before: Vec<Vec<Cell>>,
    /// A template that is being typed.
    typed: Option<String>,
    pub(super) told: String,
    layout: Layout,
}

/// What a key asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Nothing,
    /// The canvas with its marks.
    Denoise,
    /// What was typed.
    Begin(String),
    Quit,
}

pub(super) fn is_interrupt(key: KeyEvent) -> bool {
    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL)
}

impl Session {
    pub(super) fn text(&self) -> String {
        let positions = self.cells.iter().map(|cell| cell.position.clone()).collect();
        let snapshot = Snapshot {
            positions,
            ..Snapshot::default()
        };
        snapshot.text()
    }

    /// A request, or why there is none.
    pub(super) fn said<T: Into<client::Request>>(
        &mut self,
        request: Result<T, Failed>,
    ) -> Option<client::Request> {
        match request {
            Ok(request) => Some(request.into()),
            Err(failed) => {
                self.told = failed.message;
                None
            }
        }
    }

    /// The canvas as it is becomes one that can be gone back to.
    pub(super) fn remember(&mut self) {
        if self.before.len() == HISTORY {
            self.before.remove(0);
        }
        self.before.push(self.cells.clone());
        self.anchor = None;
        self.told.clear();
    }

    pub(super) fn take(&mut self, tokens: &[u32], snapshot: Snapshot) {
        let cells = tokens.iter().zip(snapshot.positions);
        self.cells = cells
            .map(|(&token, position)| Cell {
                token,
                mark: if position.held == Held::Masked {
                    Mark::Gap
                } else {
                    Mark::Stays
                },
                position,
            })
            .collect();
        self.step = snapshot.step;
        self.cursor = self.cursor.min(self.cells.len().saturating_sub(1));
    }

    /// The canvas with what is marked in it; nothing where nothing is.
    pub(super) fn template(&self) -> Option<Vec<TemplatePart>> {
        let is_marked = self.cells.iter().any(|cell| cell.mark != Mark::Stays);
        let runs = self.cells.chunk_by(|a, b| a.mark == b.mark);
        let part = |run: &[Cell]| {
            let ids = run.iter().map(|cell| cell.token).collect();
            match run.first().map_or(Mark::Stays, |cell| cell.mark) {
                Mark::Stays => Part::Tokens(TokenList { ids }),
                Mark::Gap => Part::Gap(Gap {
                    positions: run.len() as u32,
                    allowed: None,
                }),
                Mark::Draft => Part::Draft(Draft {
                    content: Some(draft::Content::Tokens(TokenList { ids })),
                }),
            }
        };
        let part = |run| TemplatePart {
            part: Some(part(run)),
        };
        is_marked.then(|| runs.map(part).collect())
    }

    /// Positions that are selected: the cursor's at least.
    fn selected(&self) -> std::ops::Range<usize> {
        let anchor = self.anchor.unwrap_or(self.cursor);
        let end = anchor.max(self.cursor) + 1;
        anchor.min(self.cursor)..end.min(self.cells.len())
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "most keys mean nothing here")]
    pub(super) fn press(&mut self, key: KeyEvent) -> Wanted {
        if is_interrupt(key) {
            return Wanted::Quit;
        }
        if key.code != KeyCode::Null {
            self.told.clear();
        }
        if let Some(typed) = &mut self.typed {
            match key.code {
                KeyCode::Enter => return Wanted::Begin(self.typed.take().unwrap_or_default()),
                KeyCode::Esc => self.typed = None,
                KeyCode::Backspace => drop(typed.pop()),
                KeyCode::Char(c) => typed.push(c),
                _ => {}
            }
            return Wanted::Nothing;
        }
        match key.code {
            KeyCode::Enter => return Wanted::Denoise,
            KeyCode::Char('q') | KeyCode::Esc => return Wanted::Quit,
            KeyCode::Left => self.cursor = self.cursor.saturating_sub(1),
            KeyCode::Right => self.go_to(self.cursor + 1),
            KeyCode::Home => self.cursor = 0,
            KeyCode::End => self.go_to(self.cells.len()),
            KeyCode::Up => self.line(-1),
            KeyCode::Down => self.line(1),
            KeyCode::Char(' ') => {
                self.anchor = match self.anchor {
                    None => Some(self.cursor),
                    Some(_) => None,
                }
            }
            KeyCode::Char('g') => self.mark(Mark::Gap),
            KeyCode::Char('n') => self.mark(Mark::Draft),
            KeyCode::Char('i') => self.insert(),
            KeyCode::Char('d') | KeyCode::Delete => self.delete(),
            KeyCode::Char('e') => self.typed = Some(self.text().replace('\\', r"\\").replace('[', r"\[")),
            KeyCode::Char('u') => match self.before.pop() {
                Some(cells) => self.cells = cells,
                None => "there is nothing before it".clone_into(&mut self.told),
            },
            _ => {}
        }
        Wanted::Nothing
    }

    fn go_to(&mut self, position: usize) {
        self.cursor = position.min(self.cells.len().saturating_sub(1));
    }

    /// Goes up or down a line.
    fn line(&mut self, by: isize) {
        let starts: Vec<usize> = self.layout.starts().collect();
        let own = starts
            .partition_point(|start| *start <= self.cursor)
            .saturating_sub(1);
        let there = own.saturating_add_signed(by).min(starts.len().saturating_sub(1));
        if let (Some(from), Some(to)) = (starts.get(own), starts.get(there)) {
            self.go_to(to + self.cursor.saturating_sub(*from));
        }
    }

    /// Marks what is selected, or takes the same mark away.
    fn mark(&mut self, mark: Mark) {
        let selected = self.selected();
        let Some(cells) = self.cells.get_mut(selected) else {
            return;
        };
        // A mask has no token to go back to.
        let is_all = cells.iter().all(|cell| cell.mark == mark);
        for cell in cells.iter_mut().filter(|cell| cell.position.held != Held::Masked) {
            cell.mark = if is_all { Mark::Stays } else { mark };
        }
        self.anchor = None;
        let marked = self.cells.iter().filter(|cell| cell.mark != Mark::Stays).count();
        self.told = format!("{marked} of {} positions marked", self.cells.len());
    }

    /// A new gap after the cursor.
    fn insert(&mut self) {
        self.remember();
        let gap = Cell {
            token: 0,
            position: Position {
                text: String::new(),
                held: Held::Masked,
            },
            mark: Mark::Gap,
        };
        let at = (self.cursor + 1).min(self.cells.len());
        self.cells.insert(at, gap);
        self.go_to(at);
    }

    fn delete(&mut self) {
        self.remember();
        let selected = self.selected();
        self.cells.drain(selected.clone());
        self.go_to(selected.start);
    }

    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let [text, told, help] =
            Rows::vertical([Constraint::Min(3), Constraint::Length(1), Constraint::Length(2)])
                .areas(frame.area());
        let (selected, looks) = (self.selected(), Looks::wanted());
        let positions: Vec<Position> = self.cells.iter().map(|cell| cell.position.clone()).collect();
        let style = |at: usize, position: &Position| {
            let style = match self.cells.get(at).map(|cell| cell.mark) {
                Some(Mark::Gap) if position.held != Held::Masked => {
                    Style::new().add_modifier(Modifier::CROSSED_OUT)
                }
                Some(Mark::Draft) => Style::new().add_modifier(Modifier::UNDERLINED),
                _ => looks.of(position, self.step),
            };
            if selected.contains(&at) {
                style.add_modifier(Modifier::REVERSED)
            } else {
                style
            }
        };
        let columns = usize::from(text.width.saturating_sub(4)).max(8);
        let mut lines = self.layout.lines(&positions, columns, style);
        if let Some(typed) = &self.typed {
            lines = vec![Line::from(format!("{typed}▏"))];
        }
        let title = if self.typed.is_some() {
            " the template: enter begins with it, escape goes back "
        } else {
            " denoised play "
        };
        let block = Block::bordered().title(title);
        let paragraph = Paragraph::new(lines).block(block);
        let paragraph = if self.typed.is_some() {
            paragraph.wrap(Wrap { trim: false })
        } else {
            paragraph
        };
        frame.render_widget(paragraph, text);
        frame.render_widget(
            Line::styled(self.told.clone(), Style::new().fg(Color::Cyan)),
            told,
        );
        frame.render_widget(Paragraph::new(HELP).wrap(Wrap { trim: true }), help);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(texts: &[&str]) -> Session {
        let cell = |(token, text): (usize, &&str)| Cell {
            token: token as u32,
            position: Position {
                text: (*text).to_owned(),
                held: Held::Given,
            },
            mark: Mark::Stays,
        };
        Session {
            cells: texts.iter().enumerate().map(cell).collect(),
            ..Session::default()
        }
    }

    fn press(session: &mut Session, keys: &str) -> Wanted {
        let mut wanted = Wanted::Nothing;
        for key in keys.chars() {
            let code = match key {
                '>' => KeyCode::Right,
                '<' => KeyCode::Left,
                '\n' => KeyCode::Enter,
                other => KeyCode::Char(other),
            };
            wanted = session.press(KeyEvent::new(code, KeyModifiers::NONE));
        }
        wanted
    }

    fn parts(session: &Session) -> Vec<Part> {
        let parts = session.template().into_iter().flatten();
        parts.filter_map(|part| part.part).collect()
    }

    #[test]
    fn what_is_marked_becomes_gaps_and_drafts_and_the_rest_stays_as_its_tokens() {
        let mut session = session(&["In", " the", " beginning", " God", "."]);
        assert_eq!(session.template(), None);
        assert_eq!(press(&mut session, ">g> >n>i"), Wanted::Nothing);
        let ids = |ids: &[u32]| TokenList { ids: ids.to_vec() };
        let gap = |positions| {
            Part::Gap(Gap {
                positions,
                allowed: None,
            })
        };
        assert_eq!(
            parts(&session),
            [
                Part::Tokens(ids(&[0])),
                gap(1),
                Part::Draft(Draft {
                    content: Some(draft::Content::Tokens(ids(&[2, 3]))),
                }),
                Part::Tokens(ids(&[4])),
                gap(1),
            ]
        );
        assert_eq!(press(&mut session, "\n"), Wanted::Denoise);
        // The same mark again takes it away, and undoing brings back what was deleted.
        assert_eq!(press(&mut session, "du<<<<<<>g"), Wanted::Nothing);
        assert_eq!(parts(&session)[0], Part::Tokens(ids(&[0, 1])));
        assert_eq!(session.text(), "In the beginning God.░");
    }

    #[test]
    fn text_is_typed_anew_and_keys_at_the_margins_do_nothing() {
        let mut session = session(&["a", "["]);
        assert_eq!(press(&mut session, "<<>>>>e"), Wanted::Nothing);
        assert_eq!(session.typed.as_deref(), Some(r"a\["));
        assert_eq!(press(&mut session, "q\n"), Wanted::Begin(r"a\[q".to_owned()));
        assert_eq!(press(&mut session, "ddd"), Wanted::Nothing);
        assert!(session.cells.is_empty());
        assert_eq!(press(&mut session, "g<>dq"), Wanted::Quit);
    }
}
